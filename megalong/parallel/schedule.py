"""Megatron-core's schedules over a DeepSpeed engine, and sums of gradients that it leaves to us."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megalong.parallel.cpu import cuda_means_cpu
from megalong.parallel.deepspeed_private import (
    accumulated_gradient,
    announce_backward,
    count_once_in_norm,
)


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


class ScheduleModule(torch.nn.Module):
    """What Megatron-core's schedule sees as the model, or as a chunk of it: calls go through the
    DeepSpeed engine, attributes come from the GPTModel inside it."""

    def __init__(self, engine: Any, model: torch.nn.Module, chunk: int):
        super().__init__()
        # Kept out of the module tree: this is a view, and owns no parameters.
        object.__setattr__(self, "engine", engine)
        self.chunk = chunk
        self.config = model.config
        self.model_type = model.model_type
        self.share_embeddings_and_output_weights = model.share_embeddings_and_output_weights
        self.set_input_tensor = model.set_input_tensor
        self.vp_stage = model.vp_stage

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.engine(*args, chunk=self.chunk, **kwargs)
        return _AnnounceBackward.apply(output, self.engine)


class _AnnounceBackward(torch.autograd.Function):
    """The identity; its backward tells DeepSpeed that another backward pass begins."""

    @staticmethod
    def forward(ctx, output, engine):
        ctx.engine = engine
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        announce_backward(ctx.engine)
        return gradient, None


def run_schedule(
    forward_step: Callable[..., Any],
    batches: Iterator[Any],
    modules: list[ScheduleModule],
    *,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> list[Any]:
    """Forward, and backward unless `forward_only`, over the micro batches.

    modules: the chunks of this stage; each sees every micro batch.
    forward_step: of (batches, module); returns the output and a function that makes of it the loss
        to differentiate and a value to report. Returns the reported values, one a micro batch.
    """
    interleaved = len(modules) > 1
    with cuda_means_cpu():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=list(tee(batches, len(modules))) if interleaved else batches,
            model=modules if interleaved else modules[0],
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
