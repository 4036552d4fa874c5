"""What the training of a cell costs: how many iterations its budget is, in tokens and in FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from grid import Cell, as_flags

from megalong.config.arguments import parse_arguments
from megalong.errors import UserError
from megalong.model.flops import executed_flops


@dataclass(frozen=True)
class Cost:
    """Of a whole training. flops: executed, backward passes and what is computed again included, by
    part (`megalong.model.flops.executed_flops`). parameters: with the embedding's. stages: the
    iterations of each, of a training that has several."""

    iterations: int
    tokens: int
    flops: dict[str, int]
    parameters: int
    stages: tuple[int, ...] = ()

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def cost_of(cell: Cell, equal: str, vocab_size: int, processes: int) -> Cost:
    """Raises UserError where the flags are wrong, or a budget is less than an iteration."""
    if not cell.stages:
        return _cost(cell.name, cell.flags, cell.budget, equal, vocab_size, processes)
    costs = []
    for stage in cell.stages:
        flags = {name: value for name, value in stage.items() if name not in ("name", "share")}
        flags, budget = {**cell.flags, **flags}, stage["share"] * cell.budget
        costs.append(_cost(cell.name, flags, budget, equal, vocab_size, processes))
    return Cost(
        iterations=sum(cost.iterations for cost in costs),
        tokens=sum(cost.tokens for cost in costs),
        flops=dict(sum((Counter(cost.flops) for cost in costs), Counter())),
        parameters=costs[0].parameters,
        stages=tuple(cost.iterations for cost in costs),
    )


def _cost(
    name: str, flags: dict[str, Any], budget: float, equal: str, vocab_size: int, processes: int
) -> Cost:
    from megalong.model.parameters import count_parameters

    # The data and the tokenizer do not matter, but have to be named.
    paths: dict[str, Any] = {"data_path": "data", "tokenizer_model": "tokenizer"}
    config = parse_arguments(as_flags({**paths, **flags})).resolve(processes)
    step_flops = executed_flops(config, vocab_size)
    step_tokens = config.training.global_batch_size * config.model.seq_length
    a_step = step_tokens if equal == "tokens" else sum(step_flops.values())
    iterations = round(budget / a_step)
    if iterations < 1:
        raise UserError(f"cell {name}: its budget is less than one iteration of {a_step:,}")
    return Cost(
        iterations=iterations,
        tokens=iterations * step_tokens,
        flops={part: iterations * flops for part, flops in step_flops.items()},
        parameters=count_parameters(config.model, vocab_size).used,
    )
