"""Megatron-core's schedules, over a model that a DeepSpeed engine holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import tee
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megalong.parallel.cpu import cuda_means_cpu
from megalong.parallel.deepspeed_private import announce_backward


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
