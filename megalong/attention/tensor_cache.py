"""Caches for functions that make tensors: from integers, and from tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch.utils.weak import WeakTensorKeyDictionary

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
