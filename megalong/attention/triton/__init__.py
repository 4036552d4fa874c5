"""The Triton backend: dilated attention in a fixed number of kernel launches."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from megalong.attention.triton.tile_sizes import interpreting


def unsupported(device, dtype, head_dim) -> str | None:
    """Why it cannot run. A GPU that is not there is one of a dry run on fake tensors: such as the
    kernels are made for, with Triton installed."""
    absent = device.type == "cuda" and not torch.cuda.is_available()
    if not absent and find_spec("triton") is None:
        return "triton is not installed"
    if head_dim > 256:
        return f"head_dim is {head_dim}, more than 256"
    if interpreting():
        if device.type != "cpu":
            return "TRITON_INTERPRET=1 runs on the CPU"
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None
    if device.type != "cuda" or torch.version.hip:
        return "it needs an NVIDIA GPU"
    if not absent and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    if dtype == torch.float32 and head_dim > 128:
        return f"head_dim is {head_dim}, and float32 tiles of more than 128 do not fit"
    if dtype == torch.float64:
        return "float64 runs in the interpreter only"
    return None


def __getattr__(name: str):
    """The other functions of a backend, from where they run: kernels import triton."""
    if name not in ("forward", "backward", "attend_rows", "attend_rows_backward"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.launch"), name)
