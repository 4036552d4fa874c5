"""What every kind of attention asks of its arguments."""

from __future__ import annotations

import math

import torch

from megalong.attention.pattern import check_heads

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> float:
    """The scale to compute with. Raises ValueError naming the argument to change.

    q: (batch, sequence, heads, head_dim); k, v: (batch, sequence, kv_heads, head_dim).
    """
    _check_tensors(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < math.inf:  # the kernels mask by -inf before they scale
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def _check_tensors(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, sequence, heads, head_dim), got {tuple(x.shape)}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: cast it"
            )
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}: give q, k "
                "and v one dtype and one device"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    for axis, size in (("batch", 0), ("sequence", 1), ("head_dim", 3)):
        if q.shape[size] != k.shape[size]:
            raise ValueError(
                f"q and k must agree in {axis}, got {tuple(q.shape)} and {tuple(k.shape)}"
            )
    if q.shape[3] < 1:
        raise ValueError("head_dim must be at least 1")
    check_heads(q.shape[2], k.shape[2])
