"""Tile sizes of the kernels, per GPU generation, dtype and head_dim: a small table, no search.

The choice follows from what ptxas says about the compiled kernels (registers, spills, shared
memory), which the tests check for every line on sm_80 and sm_90; a line that starts to spill, or
outgrows the shared memory, fails there and not on a user's GPU. Nothing is timed at run time;
lines of another table can stand in a file that MEGALONG_TRITON_CONFIGURATIONS names.

The table knows no warp specialisation. Triton 3.6 to 3.9 specialise only loops whose operands come
through tensor descriptors (NVGPUWarpSpecialization stops at our loads with "unsupported load type
for producer commit"), and descriptors would forbid rows that are not a multiple of 16 bytes apart.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch


class TileSizes(NamedTuple):
    """block_m queries by block_n keys at a time, in so many warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


KERNELS = ("forward", "dq", "dkdv")
HEAD_DIMS = (64, 128, 256)  # a head_dim takes the line of the next larger one
FILE_VARIABLE = "MEGALONG_TRITON_CONFIGURATIONS"

# "half" is bfloat16 and float16. float32, "single", multiplies three times in TensorFloat-32 and
# takes twice the memory: smaller tiles, no more than 128 numbers a row, one choice for all GPUs.
# The lines of sm_80 stay below 99 KiB of shared memory, those of sm_90 below 227 KiB.
TABLE = {
    # generation, dtype, head_dim: forward, dq, dkdv
    "sm_80 half 64": ((128, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
    "sm_80 half 128": ((128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
    "sm_80 half 256": ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    "sm_80 single 64": ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    "sm_80 single 128": ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    "sm_90 half 64": ((128, 128, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
    "sm_90 half 128": ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    "sm_90 half 256": ((128, 32, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    "sm_90 single 64": ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    "sm_90 single 128": ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # bytes for one block, at most

DELTA = TileSizes(64, 64, 4, 1)  # bound by memory
INTERPRETED = TileSizes(16, 16, 1, 1)


def sizes_of(kernel: str, head_dim: int, dtype: torch.dtype, generation: int):
    """The tile sizes of a kernel, one of KERNELS or "delta".

    generation: 80, 90, or 0 for the interpreter.
    """
    if generation == 0:
        return INTERPRETED
    if kernel == "delta":
        return DELTA
    file = os.environ.get(FILE_VARIABLE)
    table = table_with(file) if file else TABLE
    return TileSizes(*table[line_name(generation, dtype, head_dim)][KERNELS.index(kernel)])


def splits(head_dim: int, dtype: torch.dtype, generation: int) -> bool:
    """Whether the kernels loop over tiles that need no mask apart from those at edges. Two loops
    want more registers than one, which the largest tiles and those of the smallest heads do not
    have: they would spill."""
    return generation == 0 or (dtype.itemsize == 2 and 32 <= padded_head_dim(head_dim) <= 128)


def line_name(generation: int, dtype: torch.dtype, head_dim: int) -> str:
    """The key of TABLE for such inputs."""
    kind = "single" if dtype == torch.float32 else "half"
    bound = next(bound for bound in HEAD_DIMS if padded_head_dim(head_dim) <= bound)
    return f"sm_{generation} {kind} {bound}"


@lru_cache(maxsize=4)
def table_with(file: str) -> dict:
    """TABLE with the lines of a JSON file, {key of TABLE: [forward, dq, dkdv]}, instead of its own.

    Raises ValueError naming the file and the line if that is not one.
    """
    lines = json.loads(Path(file).read_text())
    for key, line in lines.items():
        fields = len(TileSizes._fields)
        if key not in TABLE or [len(x) for x in line] != [fields] * len(KERNELS):
            raise ValueError(
                f"{FILE_VARIABLE}={file}: {key!r}: {line} is no line of the table; a line looks "
                f"like {json.dumps({'sm_90 half 128': TABLE['sm_90 half 128']})}"
            )
    return TABLE | lines


def padded_head_dim(head_dim: int) -> int:
    """Tensor cores want a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


@lru_cache(maxsize=64)
def generation_of(device: torch.device) -> int:
    """The generation whose lines run on a device; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    return newest_that_fits(
        torch.cuda.get_device_capability(device),
        torch.cuda.get_device_properties(device).shared_memory_per_block_optin,
    )


def newest_that_fits(capability: tuple[int, int], shared_memory: int) -> int:
    """The newest generation in the table that a GPU is not older than and has the memory for.

    So a newer GPU than the table knows takes the lines of sm_90, or those of sm_80 where a block
    has little shared memory, as on sm_120: slower than lines of its own, but they run.
    """
    fits = [
        generation
        for generation, needed in SHARED_MEMORY.items()
        if capability >= divmod(generation, 10) and shared_memory >= needed
    ]
    return max(fits, default=min(SHARED_MEMORY))


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
