"""Triton kernels of what is elementwise: each number read and written once."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType

import torch


def kernels_for(x: torch.Tensor) -> ModuleType | None:
    """Return the module of the kernels, where they run on such a tensor."""
    if not runs_on(x):
        return None
    from megalong.model.chunked.triton import kernels

    return kernels


def runs_on(x: torch.Tensor) -> bool:
    """Return whether the kernels run on such a tensor: on an NVIDIA GPU from Ampere on, with Triton
    installed; in Triton's interpreter (TRITON_INTERPRET=1) on the CPU, but for bfloat16, which it
    does not round to the nearest."""
    return _runs_on(x.device, x.dtype)


@lru_cache(maxsize=64)
def _runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    if find_spec("triton") is None:
        return False
    from triton import knobs

    if knobs.runtime.interpret:
        return device.type == "cpu" and dtype != torch.bfloat16
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
