"""What the training of a cell costs: how many iterations its budget is, in tokens and in FLOPs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from grid import Cell, as_flags

from megalong.config import Config
from megalong.config.arguments import parse_arguments
from megalong.config.recipe import parse_run
from megalong.model.flops import executed_flops
from megalong.utils.errors import UserError

_MANY = 10**6  # iterations, where it is not known yet how many there will be


@dataclass(frozen=True)
class Cost:
    """Of a whole training. flops: executed, backward passes and what is computed again included, by
    part (`megalong.model.flops.executed_flops`). parameters: with the embedding's. stages: the
    iterations of each, of a training that has several. seq_length, attention: of the last."""

    iterations: int
    tokens: int
    flops: dict[str, int]
    parameters: int
    seq_length: int
    attention: tuple[str, ...]
    stages: tuple[int, ...] = ()

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def cost_of(cell: Cell, equal: str, vocab_size: int, processes: int) -> Cost:
    """Raises UserError, which names the cell, where the flags or the stages are wrong, or a budget
    is less than an iteration."""
    from megalong.model.parameters import count_parameters

    configs = _configs(cell, processes, [_MANY] * len(cell.stages))
    shares = [stage["share"] for stage in cell.stages] or [1.0]
    iterations, tokens, flops = [], 0, Counter()
    for config, share in zip(configs, shares, strict=True):
        step_flops = executed_flops(config, vocab_size)
        step_tokens = config.training.global_batch_size * config.model.seq_length
        a_step = step_tokens if equal == "tokens" else sum(step_flops.values())
        count = round(share * cell.budget / a_step)
        if count < 1:
            raise UserError(
                f"cell {cell.name}: its budget is less than one iteration of {a_step:,}"
            )
        iterations.append(count)
        tokens += count * step_tokens
        flops.update({part: count * each for part, each in step_flops.items()})
    if cell.stages:
        _configs(cell, processes, iterations)  # may be too short for a warm-up
    return Cost(
        iterations=sum(iterations),
        tokens=tokens,
        flops=dict(flops),
        parameters=count_parameters(configs[-1].model, vocab_size).used,
        seq_length=configs[-1].model.seq_length,
        attention=configs[-1].attention.attention,
        stages=tuple(iterations) if cell.stages else (),
    )


def _configs(cell: Cell, processes: int, iterations: Sequence[int]) -> list[Config]:
    """Of its stages, which have so many iterations, or of the whole training."""
    # Where data, tokenizer and checkpoints lie does not matter, but has to be named.
    paths = {"data_path": "data", "tokenizer_model": "tokenizer", "save": "run"}
    flags = as_flags({**paths, **cell.flags})
    try:
        if not cell.stages:
            return [parse_arguments(flags).resolve(processes)]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "stages.yaml"
            file.write_text(stages_file(cell.stages, iterations))
            recipe = parse_run(["--config", str(file), *flags])
            return [stage.config for stage in recipe.resolve(processes)]
    except UserError as error:
        raise UserError(f"cell {cell.name}: {error}") from None


def stages_file(stages: Sequence[dict[str, Any]], iterations: Sequence[int]) -> str:
    """The YAML of a training's stages, for --config."""
    content = [
        {**{name: value for name, value in stage.items() if name != "share"}, "train_iters": count}
        for stage, count in zip(stages, iterations, strict=True)
    ]
    return yaml.safe_dump({"stages": content}, sort_keys=False)
