"""Megatron-core on a machine without a GPU.

Megatron-core names `torch.cuda` in a few places whatever the device: where it asks for the current
device, synchronises, reads random states, and where its schedules create a counter. Without a GPU
these names are pointed at the CPU here, and nowhere else; with one, nothing is touched.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megalong.utils.machine import use_gpu

NAMES = {
    "megatron.core.tensor_parallel.random": {
        "_get_cuda_rng_state": "how recomputation and dropout read the random state",
        "_set_cuda_rng_state": "and set it; both ask for a GPU",
    },
}


def enable_megatron_without_gpu() -> None:
    """Point the `torch.cuda` functions that Megatron-core calls at the CPU. May be called again."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.manual_seed = torch.manual_seed
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def cuda_means_cpu() -> contextlib.AbstractContextManager[Any]:
    """A context in which `device="cuda"` and `.cuda()` mean the CPU, where there is no GPU."""
    return contextlib.nullcontext() if use_gpu() else _CudaMeansCpu()


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)
