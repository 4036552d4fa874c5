"""A cache for functions that make index tensors from integers."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps

import torch

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

    return cached
