"""The mesh: how many ranks share which axis, and which of them this process is.

The axes are Megatron-core's: tensor (innermost), sequence (its context-parallel slot), data,
pipeline. Everything that reduces over an axis asks the mesh for the group by its purpose.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from megalong.config import ConfigError
from megalong.device import use_gpu
from megalong.parallel import cpu


@dataclass(frozen=True)
class Mesh:
    """This process's place: sizes, ranks, groups and device.

    data_parallel_size, data_parallel_rank: replicas of the model that see different sequences.
    is_main: the one process that writes metrics, prints, and keeps the run folder.
    """

    data_parallel_size: int
    data_parallel_rank: int
    device: torch.device
    world_size: int
    rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_data(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks that see different tokens, in place; returns it."""
        if self.data_parallel_size > 1:
            from megatron.core import parallel_state

            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(tensor, group=group)
        return tensor


def check_precision(precision: str) -> None:
    """Raise ConfigError where this machine's device cannot train in "fp32", "bf16" or "fp16"."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if precision in supported and not supported[precision]():
        raise ConfigError(
            f"--precision {precision} is not supported by DeepSpeed on this machine's"
            f" {accelerator.device_name()}: set --precision fp32"
            + (" or bf16" if precision == "fp16" and accelerator.is_bf16_supported() else "")
        )


@contextlib.contextmanager
def launch(seed: int, timeout_minutes: int = 10) -> Iterator[Mesh]:
    """Join the process group of this launch and build the mesh; leave both at the end.

    Under torchrun or the deepspeed launcher the environment names the ranks; a plain `python` run
    is a group of one. NCCL and one GPU per process where there are GPUs, gloo otherwise. All random
    generators start from `seed`. A collective that takes longer than `timeout_minutes` is an error.
    """
    import deepspeed
    from megatron.core import parallel_state, tensor_parallel

    on_gpu = use_gpu()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} are"
                " visible; start as many processes, or set DS_ACCELERATOR=cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        cpu.enable_megatron_without_gpu()
        cpu.skip_deepspeed_shared_memory_kernels()
    with _single_process_environment():
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=timeout_minutes),
        )
        try:
            parallel_state.initialize_model_parallel(distributed_timeout_minutes=timeout_minutes)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            yield Mesh(
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
                world_size=dist.get_world_size(),
                rank=dist.get_rank(),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@contextlib.contextmanager
def _single_process_environment() -> Iterator[None]:
    """Rendezvous variables for a process that no launcher started: a group of one, on a free port.

    A launcher's own variables are left alone.
    """
    import socket

    if "RANK" in os.environ:
        yield
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name)
