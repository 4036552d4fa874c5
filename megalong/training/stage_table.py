"""What the stages of a run are, and what each costs: said without building anything."""

from __future__ import annotations

import dataclasses
import os

from megalong.config import Config, world_size
from megalong.config.stages import Recipe, Stage
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.model.flops import executed_flops
from megalong.progress import human_flops
from megalong.training.learning_rate import learning_rate
from megalong.wording import aligned, counted

_HEAD = (
    "stage", "sequence", "iterations", "tokens", "learning rate", "FLOPs executed", "share",
    "attention",
)  # fmt: skip


def print_stages(recipe: Recipe) -> None:
    """Print the table, on one rank of however many were started. Raises UserError where a stage
    cannot work, or there is no tokenizer, whose vocabulary counts."""
    launched = "RANK" in os.environ
    ranks = recipe.dry_run or (world_size() if launched else recipe.fewest_ranks)
    stages = recipe.resolve(ranks)
    if os.environ.get("RANK", "0") == "0":
        print(stage_table(stages, _vocabulary(stages[0].config), ranks))


def stage_table(stages: tuple[Stage, ...], vocab_size: int, ranks: int) -> str:
    """A line for each stage, and below them what is to be said of all. vocab_size: ids of the
    tokenizer."""
    flops = [stage.iterations * _step_flops(stage.config, vocab_size) for stage in stages]
    rows = [_HEAD]
    for stage, cost in zip(stages, flops, strict=True):
        rows.append(
            (
                stage.name or "(the run)",
                f"{stage.config.model.seq_length:,}",
                f"{stage.iterations:,}",
                f"{stage.tokens:,}",
                _rates(stage),
                human_flops(cost),
                f"{cost / sum(flops):.1%}",
                stage.config.attention.description,
            )
        )
    tokens = sum(stage.tokens for stage in stages)
    lines = [
        aligned(rows, words=(0, 4, -1)),
        "",
        f"{counted(stages[-1].end, 'iteration')}, {tokens:,} tokens, {human_flops(sum(flops))}, on"
        f" {counted(ranks, 'rank')}",
    ]
    if len(stages) > 1:
        throughout = tokens * flops[-1] / stages[-1].tokens
        lines.append(
            f"as many tokens in sequences of the last stage throughout: {human_flops(throughout)},"
            f" {throughout / sum(flops):.2f} times as much"
        )
    if any(stage.config.memory.memory_path == "auto" for stage in stages):
        lines.append(
            "where --memory-path auto computes more a second time, which the memory of the device"
            " decides, that is not in these numbers"
        )
    return "\n".join([*lines, *(note for stage in stages for note in stage.notes)])


def _step_flops(config: Config, vocab_size: int) -> int:
    """That all ranks together execute in a step."""
    memory = config.memory
    if memory.memory_path == "auto":
        memory = memory.with_pieces(False, config.model, config.parallel)
    settled = dataclasses.replace(config, memory=memory)
    return sum(executed_flops(settled, vocab_size).values())


def _rates(stage: Stage) -> str:
    """ "6e-04 to 6e-05, cosine, warm-up 100"."""
    training = stage.config.training
    last = learning_rate(stage.end, training)
    words = f"{training.lr:.2g} to {last:.2g}, {training.lr_decay_style}"
    warmup = training.lr_warmup_iters
    return words + (f", warm-up {warmup:,}" if warmup else "")


def _vocabulary(config: Config) -> int:
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    return (tokenizer if config.training.causal else tokenizer.with_mask()).vocab_size
