"""Many meshes in one launch, one after the other."""

import contextlib
import gc

import torch.distributed as dist
from torch.distributed import distributed_c10d

from megalong.parallel import build_mesh


@contextlib.contextmanager
def temporary_mesh(config, device):
    """`build_mesh`, whose process groups are gone afterwards: each has threads of its own, and a
    launch with dozens of meshes would drown in them."""
    before = set(distributed_c10d._world.pg_map)
    with build_mesh(config, device) as mesh:
        made = set(distributed_c10d._world.pg_map) - before
        yield mesh
        dist.barrier()
    for group in made & set(distributed_c10d._world.pg_map):  # Megatron-core has destroyed some
        dist.destroy_process_group(group)
    gc.collect()  # models and engines hold on to them, in cycles
