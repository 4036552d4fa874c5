"""Checks, memory layout and caches of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch.utils.weak import WeakTensorKeyDictionary

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


def dense_rows(x_bshd: torch.Tensor) -> torch.Tensor:
    """x with the numbers of a row side by side, as the kernels want; other strides are free."""
    return x_bshd if x_bshd.stride(-1) == 1 else x_bshd.contiguous()


def empty_rows(x_bshd: torch.Tensor, dtype=None, device=None) -> torch.Tensor:
    """Uninitialised, with x's order of the axes in memory where that keeps rows dense."""
    empty = torch.empty_like(x_bshd, dtype=dtype, device=device)
    if empty.stride(-1) == 1:
        return empty
    return x_bshd.new_empty(x_bshd.shape, dtype=dtype, device=device)


def laid_out_like(x_bshd: torch.Tensor, like_bshd: torch.Tensor) -> torch.Tensor:
    """x, copied if its strides are not those of empty_rows(like)."""
    strides = empty_rows(like_bshd, device="meta").stride()
    axes = zip(x_bshd.shape, x_bshd.stride(), strides, strict=True)
    if all(found == wanted for size, found, wanted in axes if size > 1):
        return x_bshd
    return empty_rows(like_bshd, x_bshd.dtype).copy_(x_bshd)


# Entries of the caches of plans and tables: a model has one pattern for each layer and group of
# heads, and uses them all in every step.
PATTERNS = 1024


def tensor_cache(build: Callable) -> Callable:
    """functools.lru_cache for a function that makes tensors, which must be hashable in all its
    positional arguments.

    What is made under a FakeTensorMode (a dry run) belongs to that mode, and what is made without
    one to none: each gets its own entries, so that neither is handed out where the other is meant.
    """

    @lru_cache(maxsize=PATTERNS)
    def build_in(fake_mode, *args):
        return build(*args)

    @wraps(build)
    def cached(*args):
        # asked of a new tensor, because that is what `build` would make
        return build_in(getattr(torch.empty(0), "fake_mode", None), *args)

    cached.cache_clear = build_in.cache_clear
    return cached


def kept_with_tensor(build: Callable) -> Callable:
    """A cache for a function of a tensor of a batch, which all layers ask for the same: its results
    are kept as long as the tensor is there and nobody writes to it. What is written by some
    collectives, through `.data`, by numpy or in a CUDA graph is not seen: a new tensor per batch.

    The other arguments are tensors, which are then kept too, or hashable; all are positional.
    Results must not share memory with the first tensor, which would keep itself.
    """
    kept = WeakTensorKeyDictionary()

    @wraps(build)
    def cached(tensor: torch.Tensor, *args):
        if tensor.is_inference():  # nobody knows who writes to it
            return build(tensor, *args)
        version, results = kept.get(tensor, (None, None))
        if version != tensor._version:
            results = {}
            kept[tensor] = tensor._version, results
        key = tuple(id(x) if isinstance(x, torch.Tensor) else x for x in args)
        if key not in results:
            results[key] = build(tensor, *args), args  # with the arguments, so that an id stays one
        return results[key][0]

    return cached


def has_numbers(tensor: torch.Tensor) -> bool:
    """Not one of a FakeTensorMode (a dry run)."""
    return getattr(tensor, "fake_mode", None) is None
