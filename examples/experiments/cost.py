"""What the training of a cell costs: how many iterations its budget is, in tokens and in FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grid import Cell, as_flags

from megalong.config.arguments import parse_arguments
from megalong.errors import UserError
from megalong.model.flops import executed_flops


@dataclass(frozen=True)
class Cost:
    """Of a whole training. flops: executed, backward passes and what is computed again included, by
    part (`megalong.model.flops.executed_flops`). parameters: with the embedding's."""

    iterations: int
    tokens: int
    flops: dict[str, int]
    parameters: int

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def cost_of(cell: Cell, equal: str, vocab_size: int, processes: int) -> Cost:
    """Raises UserError where the flags are wrong, or the budget is less than an iteration."""
    from megalong.model.parameters import count_parameters

    # The data and the tokenizer do not matter, but have to be named.
    paths: dict[str, Any] = {"data_path": "data", "tokenizer_model": "tokenizer"}
    given = {**paths, **cell.flags}
    config = parse_arguments(as_flags(given)).resolve(processes)
    step_flops = executed_flops(config, vocab_size)
    step_tokens = config.training.global_batch_size * config.model.seq_length
    a_step = step_tokens if equal == "tokens" else sum(step_flops.values())
    iterations = round(cell.budget / a_step)
    if iterations < 1:
        raise UserError(f"cell {cell.name}: its budget is less than one iteration of {a_step:,}")
    return Cost(
        iterations=iterations,
        tokens=iterations * step_tokens,
        flops={part: iterations * flops for part, flops in step_flops.items()},
        parameters=count_parameters(config.model, vocab_size).used,
    )
