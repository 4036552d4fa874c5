"""The time that the cost model predicts for a case of predicted.py, from its dry runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from megalong.config.arguments import config_from_values
from megalong.dry_run.cluster import load_cluster
from megalong.dry_run.cost import step_cost
from megalong.dry_run.work import Collective, Operation, Work


def predicted_seconds(folder: Path, cluster: str) -> dict[str, Any]:
    """Seconds of a step, and of what, by the busiest rank of each stage of the pipeline."""
    case = json.loads((folder / "case.json").read_text())
    ranks = case["ranks"]
    config = config_from_values(case["values"]).resolve(ranks)
    works = [loaded(folder / f"work-{rank}.json") for rank in range(ranks)]
    stages = config.parallel.pipeline_model_parallel_size
    of_stage = ranks // stages  # consecutive ranks
    costs = [
        step_cost(works[first::of_stage], load_cluster(cluster), config, case["vocabulary"], ranks)
        for first in range(of_stage)
    ]
    cost = max(costs, key=lambda cost: cost.total)
    parts = {"compute": dict(cost.compute), "communication": dict(cost.communication)}
    parts |= {what: getattr(cost, what) for what in ("bubble", "launches", "update")}
    return {"predicted": cost.total, "parts": parts}


def saved(work: Work) -> dict[str, Any]:
    """For JSON: each operation and collective, and how often."""
    return {
        what: [[*vars(call).values(), count] for call, count in getattr(work, what).items()]
        for what in ("operations", "collectives")
    }


def loaded(file: Path) -> Work:
    """What was `saved`."""
    found = json.loads(file.read_text())
    operations = Counter({Operation(*call): count for *call, count in found["operations"]})
    collectives = Counter(
        {Collective(*call, tuple(ranks)): count for *call, ranks, count in found["collectives"]}
    )
    return Work(operations, collectives)
