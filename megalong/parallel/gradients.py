"""Gradients that are sums over other ranks than data-parallel ones; DeepSpeed leaves them to us."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalong.parallel.deepspeed_private import accumulated_gradient, count_once_in_norm


def sum_divided_gradients(model: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Sum, in every backward pass, the gradients of which each tensor-parallel rank has a part:
    those of the parameters that `build_model` has marked `sum_over_tensor_ranks`.

    Before DeepSpeed looks at them, whatever the ZeRO stage. They are vectors.
    group: of the tensor-parallel ranks.
    """
    if group.size() == 1:
        return
    for parameter in model.parameters():
        if parameter.sum_over_tensor_ranks:
            parameter.register_hook(lambda gradient: _sum(gradient, group))


def _sum(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = gradient.float()
    if total is gradient:
        total = gradient.clone()  # autograd may hold on to the one it gave us
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)


class TiedEmbedding:
    """The copies of the embedding on the first and on the last of several pipeline stages.

    Each collects the gradients of its own use; both must take the same step, that of the sum.
    """

    def __init__(
        self,
        weight: torch.nn.Parameter | None,
        is_copy: bool,
        group: dist.ProcessGroup | None,
    ):
        """Called before DeepSpeed sees the model. weight: None where there is no other copy.
        group: of both stages."""
        self.weight, self.group = weight, group
        if weight is not None:
            count_once_in_norm(weight, is_copy)

    def sum_gradients(self) -> None:
        """Add the two accumulated gradients up, on both; after backward, before the step."""
        if self.weight is not None:
            gradient = accumulated_gradient(self.weight)
            dist.all_reduce(gradient, group=self.group)
