"""A step of a whole model."""

from __future__ import annotations

from megalong.config import Config
from megalong.planning.dry_run import DryRun, dry_run


def planned_step(
    config: Config,
    vocab_size: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    cache: dict | None = None,
) -> DryRun:
    """What `megalong.planning.dry_run.dry_run` says of a step of this rank."""
    return dry_run(config, vocab_size, rank=rank, ranks=ranks, quick=True)
