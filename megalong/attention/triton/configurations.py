"""Tile sizes of the kernels, per head_dim and GPU generation: one small table, no search.

The choice follows from what ptxas says about the compiled kernels (registers, spills, shared
memory), which the tests check for every line on sm_80 and sm_90; a line that starts to spill, or
outgrows the shared memory, fails there and not on a user's GPU.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch


class Configuration(NamedTuple):
    """block_m queries by block_n keys at a time, in so many warps and pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


KERNELS = ("forward", "dq", "dkdv")

# {generation: {padded head_dim up to: (forward, dq, dkdv)}}. The lines of sm_80 stay below 99 KiB
# of shared memory, so that they also fit sm_86 and sm_89; those of sm_90 below 227 KiB.
HALF = {
    80: {
        64: ((128, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
        128: ((128, 64, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    },
    90: {
        64: ((128, 128, 8, 3), (128, 64, 8, 3), (32, 128, 8, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
        256: ((128, 32, 8, 2), (64, 64, 8, 2), (16, 64, 8, 2)),
    },
}
# float32 multiplies three times in TensorFloat-32 and takes twice the memory: smaller tiles, and
# no more than 128 numbers a row.
SINGLE = {
    64: ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1)),
}

DELTA = Configuration(64, 64, 4, 1)  # bound by memory
INTERPRETED = Configuration(16, 16, 1, 1)


def padded_head_dim(head_dim: int) -> int:
    """Tensor cores want a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def configuration(kernel: str, head_dim: int, dtype: torch.dtype, generation: int):
    """The Configuration of a kernel, one of KERNELS or "delta".

    generation: 80, 90, or 0 for the interpreter.
    """
    if generation == 0:
        return INTERPRETED
    if kernel == "delta":
        return DELTA
    table = SINGLE if dtype == torch.float32 else HALF[generation]
    line = next(line for bound, line in table.items() if padded_head_dim(head_dim) <= bound)
    return Configuration(*line[KERNELS.index(kernel)])


def generation_of(device: torch.device) -> int:
    """The newest generation in the table that is not newer than the device; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if major >= 9 else 80


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
