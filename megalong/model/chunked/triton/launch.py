"""What every kernel's launch has in common."""

from __future__ import annotations

import torch

WARPS, BLOCK = 4, 1024  # numbers of a program: 8 a thread, which is 16 bytes of 16-bit numbers


def launch(
    kernel, programs: int, device: torch.device, *arguments, warps: int = WARPS, **names
) -> None:
    """Start a kernel on so many programs, if any."""
    if programs:
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            kernel[(programs,)](*arguments, **names, num_warps=warps, enable_fp_fusion=True)
