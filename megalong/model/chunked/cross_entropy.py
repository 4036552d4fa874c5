"""Cross entropy of logits, of which each pass makes one reading, over a slice of the vocabulary.

On a GPU each pass is one Triton kernel. The PyTorch code works in place, without temporaries of
the logits' size.

Shape suffixes: n rows, v this slice of the vocabulary.
"""

from __future__ import annotations

from types import ModuleType

import torch

from megalong.model.chunked import triton

# Operators, so that fake tensors run no kernel. Not torch.library.custom_op: slow to call.
torch.library.define(
    "megalong::read_logits_", "(Tensor(a!) logits, Tensor labels, int first) -> (Tensor, Tensor)"
)
torch.library.define(
    "megalong::differentiate_logits_",
    "(Tensor(a!) logits, Tensor labels, Tensor lse, Tensor grad, int first, Tensor(b!)? out) -> ()",
)


def read_logits_(
    logits_nv: torch.Tensor, labels_n: torch.Tensor, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' logsumexp, and the logits of their labels, 0 where the slice has not the label.

    logits: (n, v), float32 or float64, the numbers of a row side by side; not to be used after.
    labels: (n,), int64, any. first: the label of the slice's first column. Returns (n,) each, in
    the logits' dtype. Nothing is recorded for autograd. Raises ValueError where a row's numbers
    are not side by side.
    """
    require_dense_rows(logits_nv)
    return torch.ops.megalong.read_logits_(logits_nv, labels_n, first)


def differentiate_logits_(
    logits_nv: torch.Tensor,
    labels_n: torch.Tensor,
    lse_n: torch.Tensor,
    grad_n: torch.Tensor,
    first: int = 0,
    *,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of the logits: (softmax - 1 at the label) * the gradient of the row's loss.

    logits, labels, first: as `read_logits_` takes them. lse: (n,), of the whole vocabulary. grad:
    (n,). Returns (n, v) in dtype, any float: the logits, overwritten, where dtype is theirs;
    otherwise a new tensor, and the logits are not to be used after. Nothing is recorded for
    autograd. Raises ValueError as `read_logits_` does.
    """
    require_dense_rows(logits_nv)
    out_nv = None if dtype == logits_nv.dtype else torch.empty_like(logits_nv, dtype=dtype)
    torch.ops.megalong.differentiate_logits_(logits_nv, labels_n, lse_n, grad_n, first, out_nv)
    return logits_nv if out_nv is None else out_nv


def add_at_labels_(
    x_nv: torch.Tensor, labels_n: torch.Tensor, value_n: torch.Tensor, first: int = 0
) -> None:
    """Add a value to the column of each row's label, in place, if the slice has that column."""
    place_n1, here_n1 = places(labels_n, x_nv.shape[1], first)
    x_nv.scatter_add_(1, place_n1, (value_n[:, None] * here_n1).to(x_nv.dtype))


def require_dense_rows(logits_nv: torch.Tensor) -> None:
    if logits_nv.stride(1) != 1:
        raise ValueError("cross entropy takes rows with their logits side by side")


def kernels(x: torch.Tensor) -> ModuleType | None:
    """The kernels, where they can run."""
    if not triton.runs_on(x):
        return None
    from megalong.model.chunked.triton import cross_entropy_kernels

    return cross_entropy_kernels


def places(labels_n: torch.Tensor, size: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels' columns in the slice, and whether it has them: (n, 1)."""
    place_n1 = labels_n[:, None] - first
    return place_n1.clamp(0, size - 1), (place_n1 >= 0) & (place_n1 < size)


@torch.library.impl("megalong::read_logits_", "CompositeExplicitAutograd")
def _(logits_nv, labels_n, first):
    if on_gpu := kernels(logits_nv):
        results = empty_results(logits_nv, labels_n, first)
        on_gpu.read(logits_nv, labels_n, first, *results)
        return results
    place_n1, here_n1 = places(labels_n, logits_nv.shape[1], first)
    target_n1 = logits_nv.gather(1, place_n1).masked_fill_(~here_n1, 0.0)
    largest_n1 = logits_nv.amax(1, keepdim=True)
    # In place: torch.logsumexp would need the memory of the logits once more.
    sum_n1 = logits_nv.sub_(largest_n1).exp_().sum(1, keepdim=True)
    return sum_n1.log_().add_(largest_n1).squeeze(1), target_n1.squeeze(1)


@torch.library.impl("megalong::differentiate_logits_", "CompositeExplicitAutograd")
def _(logits_nv, labels_n, lse_n, grad_n, first, out_nv):
    out_nv = logits_nv if out_nv is None else out_nv
    if on_gpu := kernels(out_nv):
        return on_gpu.differentiate(logits_nv, labels_n, lse_n, grad_n, first, out_nv)
    place_n1, here_n1 = places(labels_n, logits_nv.shape[1], first)
    softmax_nv = logits_nv.sub_(lse_n[:, None]).exp_()
    softmax_nv.scatter_add_(1, place_n1, here_n1.to(logits_nv.dtype).neg_())
    torch.mul(softmax_nv, grad_n[:, None], out=out_nv)


@torch.library.register_fake("megalong::read_logits_")
def empty_results(logits, labels, first):
    """Room for logsumexp and the labels' logits."""
    return logits.new_empty(len(logits)), logits.new_empty(len(logits))


@torch.library.register_fake("megalong::differentiate_logits_")
def _(logits, labels, lse, grad, first, out):
    pass
