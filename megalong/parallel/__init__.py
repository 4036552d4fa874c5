"""Ranks and groups: the mesh, DeepSpeed's view of it, and Megatron-core without a GPU."""

from megalong.parallel.mesh import (
    Mesh,
    build_mesh,
    check_precision,
    launch,
    process_group,
    set_gpu_defaults,
    temporary_mesh,
)
from megalong.parallel.rank_watchdog import watch_ranks

__all__ = [
    "Mesh",
    "build_mesh",
    "check_precision",
    "launch",
    "process_group",
    "set_gpu_defaults",
    "temporary_mesh",
    "watch_ranks",
]
