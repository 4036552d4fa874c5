"""What PyTorch does not document and dry runs need all the same; the same test looks for it as for
the names in `megalong.torch_private`."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,  # what a fake tensor says to `.item()`
    DynamicOutputShapeException,  # and to an index of booleans
    FakeTensor,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore  # also makes the backend "fake"
from torch.utils._pytree import tree_leaves

__all__ = [
    "EFFICIENT_ATTENTION",
    "FLASH_ATTENTION",
    "READ_VALUE",
    "TO_COPY",
    "TO_PINNED",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "is_going_backward",
    "tree_leaves",
]

# What `.item()`, `.to()` and `.pin_memory()` end up in.
READ_VALUE = torch.ops.aten._local_scalar_dense.default
TO_COPY = torch.ops.aten._to_copy.default
TO_PINNED = torch.ops.aten._pin_memory.default

# What PyTorch's dense attention runs on a GPU, in half precision and in float32.
FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
EFFICIENT_ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention


def is_going_backward() -> bool:
    """Whether autograd is computing gradients right now, recomputation for them included."""
    return torch._C._current_graph_task_id() != -1
