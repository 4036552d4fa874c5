"""The mesh: how many ranks share which axis, and which of them this process is.

The axes are Megatron-core's: tensor (innermost), sequence (its context-parallel slot), data,
pipeline. Everything that reduces over an axis asks the mesh for the group by its purpose.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megalong.attention.exchange import SequenceGroup
from megalong.config import Config
from megalong.parallel.cpu import enable_megatron_without_gpu
from megalong.parallel.deepspeed_private import skip_shared_memory_kernels
from megalong.utils.errors import UserError
from megalong.utils.machine import port_is_taken, use_gpu
from megalong.utils.torch_private import process_groups

# Whichever is set, it is the user's word on PyTorch's allocator. CUDA's is the older name of the
# first, and wins where both are set.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR_SETTINGS = "expandable_segments:True"

_DUMP_MILLISECONDS = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
DUMP_SECONDS = 15


def set_gpu_defaults() -> None:
    """Set what training wants otherwise than PyTorch, unless the user has set it. To be called
    before anything asks for a GPU.

    Expandable segments: else sequences of many lengths leave holes in the memory. And time for the
    watch over the ranks: when a rank dies, PyTorch ends this process by an abort with pages of C++
    frames, but first waits four times this setting; within that the watch has said which rank was
    lost, and has ended the process. (TORCH_NCCL_ASYNC_ERROR_HANDLING stays as it is: with PyTorch's
    milder modes a process goes on with numbers that a failed collective has left.)
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR_SETTINGS
    os.environ.setdefault(_DUMP_MILLISECONDS, str(1000 * DUMP_SECONDS))


@dataclass(frozen=True)
class Mesh:
    """This process's place: sizes, ranks, groups and device.

    sequence: the ranks that share this one's sequence. data_group: those at this one's place in the
    replicas. replica_group: those that hold the same weights, over data and sequence axis.
    model_group: those that hold the parts of one replica. embedding_group: of a pipeline's first
    and last stage, which share a tied embedding; None between them. host_group: all, over gloo.
    """

    sequence: SequenceGroup
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    embedding_group: dist.ProcessGroup | None
    host_group: dist.ProcessGroup
    tensor_parallel_size: int
    tensor_parallel_rank: int
    pipeline_parallel_size: int
    pipeline_parallel_rank: int
    data_parallel_size: int
    data_parallel_rank: int
    device: torch.device
    world_size: int
    rank: int

    @property
    def is_main(self) -> bool:
        """The one process that writes metrics, prints, and keeps the run folder."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_parallel_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1

    @property
    def stage_size(self) -> int:
        """Ranks that hold the same layers, or parts of them: all those of a pipeline stage."""
        return self.tensor_parallel_size * self.sequence.size * self.data_parallel_size

    @property
    def stage_rank(self) -> int:
        """This rank's number among those of its pipeline stage."""
        shard = self.sequence.rank + self.sequence.size * self.data_parallel_rank
        return self.tensor_parallel_rank + self.tensor_parallel_size * shard

    @property
    def reports_losses(self) -> bool:
        """Whether this rank's token losses count: the last stage has them, every tensor rank the
        same ones."""
        return self.is_last_stage and self.tensor_parallel_rank == 0

    @property
    def groups_by_axis(self) -> dict[str, list[dist.ProcessGroup]]:
        """The groups of this rank under the names of the axes: "tensor", "sequence", "pipeline",
        and "data", which is what reduces gradients and shards the optimizer: over replicas and,
        where there are several, shards of a sequence."""
        pipeline = [self.pipeline_group, self.embedding_group]
        return {
            "sequence": list(self.sequence.subgroups.values()),
            "data": [self.data_group, self.replica_group],
            "tensor": [self.tensor_group],
            "pipeline": [group for group in pipeline if isinstance(group, dist.ProcessGroup)],
        }

    def sequence_range(self, seq_length: int) -> tuple[int, int]:
        """The positions [start, stop) of a sequence that this rank holds."""
        shard = seq_length // self.sequence.size
        return self.sequence.rank * shard, (self.sequence.rank + 1) * shard

    def sum_of_losses(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks whose losses count, on every rank; in place."""
        if not self.reports_losses:
            tensor.zero_()
        dist.all_reduce(tensor)
        return tensor

    def of_main(self, tensor: torch.Tensor) -> torch.Tensor:
        """The `tensor` of the main process, on every rank; in place."""
        dist.broadcast(tensor, src=0)
        return tensor


def check_precision(precision: str) -> None:
    """Raise UserError where this machine's device cannot train in "fp32", "bf16" or "fp16"."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    supported = {"bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    if precision in supported and not supported[precision]():
        raise UserError(
            f"--precision {precision} is not supported by DeepSpeed on this machine's"
            f" {accelerator.device_name()}: set --precision fp32"
            + (" or bf16" if precision == "fp16" and accelerator.is_bf16_supported() else "")
        )


@contextlib.contextmanager
def launch(config: Config) -> Iterator[Mesh]:
    """Join the process group of this launch and build the mesh; leave both at the end.

    config: resolved. All random generators start from its seed.
    """
    with (
        process_group(config.run.distributed_timeout_minutes) as device,
        build_mesh(config, device) as mesh,
    ):
        yield mesh


@contextlib.contextmanager
def process_group(timeout_minutes: int = 10) -> Iterator[torch.device]:
    """Join the process group of this launch, and yield this process's device: a GPU each and NCCL
    where there are GPUs, gloo otherwise. A plain `python` run is a group of one.

    A collective that takes longer than `timeout_minutes` is an error. DeepSpeed binds the group to
    the GPU, so that later groups are split off the first by ncclCommSplit.
    """
    import deepspeed

    on_gpu = use_gpu()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} are"
                " visible; start as many processes, or set DS_ACCELERATOR=cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        enable_megatron_without_gpu()
        skip_shared_memory_kernels()
    with _single_process_environment():
        try:
            deepspeed.init_distributed(
                "nccl" if on_gpu else "gloo",
                auto_mpi_discovery=False,
                verbose=False,
                timeout=timedelta(minutes=timeout_minutes),
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise port_is_taken(os.environ["MASTER_PORT"]) from error
        try:
            yield torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        except BaseException:
            # NCCL's farewell waits for collectives that the other ranks may never join. The end of
            # the process does not, and the error has to be told before the watch ends all ranks.
            if not on_gpu:
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()


@contextlib.contextmanager
def build_mesh(config: Config, device: torch.device) -> Iterator[Mesh]:
    """Divide the process group as `config.parallel` says; undone at the end."""
    from megatron.core import parallel_state, tensor_parallel

    parallel, seed = config.parallel, config.training.seed
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.sequence_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_size(config.model),
        distributed_timeout_minutes=config.run.distributed_timeout_minutes,
        # For Megatron-core's own optimizer and checkpoints. Under NCCL they would also break the
        # splitting of communicators, in which ranks outside of a group take part as well.
        create_gloo_process_groups=False,
    )
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield Mesh(
            sequence=_sequence_group(config),
            tensor_group=parallel_state.get_tensor_model_parallel_group(),
            pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            data_group=parallel_state.get_data_parallel_group(),
            replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            model_group=parallel_state.get_model_parallel_group(),
            embedding_group=parallel_state.get_embedding_group(check_initialized=False),
            host_group=_host_group(config),
            tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
            tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
            pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            device=device,
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
        )
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def temporary_mesh(config: Config, device: torch.device) -> Iterator[Mesh]:
    """`build_mesh`, whose process groups are gone at the end, and what was built on them: for one
    of several in a process. Each group has threads of its own, and under NCCL memory of the GPU."""
    before = process_groups()
    with build_mesh(config, device) as mesh:
        yield mesh
        dist.barrier()
    gc.collect()  # models and engines hold on to them, in cycles
    for group in reversed(process_groups()):  # Megatron-core has destroyed some
        if group not in before:
            dist.destroy_process_group(group)


def _sequence_group(config: Config) -> SequenceGroup:
    """The ranks of this one's sequence, with the subgroups that the pattern needs."""
    from megatron.core import parallel_state

    size = config.parallel.sequence_parallel_size
    shard = config.model.seq_length // size
    patterns = config.attention.patterns
    sizes = {
        number
        for name, kind in config.attention.kinds.items()
        for number in kind.passes_class().subgroup_sizes(patterns[name], shard, size)
    }
    timeout = timedelta(minutes=config.run.distributed_timeout_minutes)
    return SequenceGroup.create(parallel_state.get_context_parallel_group(), sizes, timeout)


def _host_group(config: Config) -> dist.ProcessGroup:
    if dist.get_backend() != "nccl":
        return dist.group.WORLD  # they talk over gloo anyway
    timeout = timedelta(minutes=config.run.distributed_timeout_minutes)
    return dist.new_group(backend="gloo", timeout=timeout)


@contextlib.contextmanager
def _single_process_environment() -> Iterator[None]:
    """Set rendezvous variables, on any port, for a process that no launcher started."""
    if "RANK" in os.environ:
        yield
        return
    values = {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name)


class DeepSpeedMPU:
    """The mesh as `deepspeed.initialize(mpu=...)` wants to see it: for each of its axes a group
    (`get_..._group`), this rank's place in it (`get_..._rank`), and its size
    (`get_..._world_size`); `..._src_rank` and `..._group_ranks` number the whole launch.

    Not Megatron-core's `parallel_state`: DeepSpeed wants `get_model_parallel_*` to span everything
    that holds different weights of one replica, without the sequence axis, which it calls
    `get_sequence_parallel_*`, and `get_sequence_data_parallel_*`, the ranks that hold the same part
    of the weights, which ZeRO partitions. It takes any object with an attribute
    `initialize_sequence_parallel` for one without model parallelism.
    """

    def __init__(self, mesh: Mesh):
        groups = {
            "tensor_model_parallel": mesh.tensor_group,
            "pipeline_model_parallel": mesh.pipeline_group,
            "model_parallel": mesh.model_group,
            "data_parallel": mesh.data_group,
            "sequence_parallel": mesh.sequence.group,
            "sequence_data_parallel": mesh.replica_group,
        }
        for axis, group in groups.items():
            setattr(self, f"get_{axis}_group", partial(_identity, group))
            setattr(self, f"get_{axis}_rank", partial(dist.get_rank, group))
            setattr(self, f"get_{axis}_world_size", partial(dist.get_world_size, group))
        first_of_tensor = dist.get_process_group_ranks(mesh.tensor_group)[0]
        self.get_tensor_model_parallel_src_rank = partial(_identity, first_of_tensor)
        ranks = dist.get_process_group_ranks(mesh.data_group)
        self.get_data_parallel_group_ranks = partial(_identity, ranks)


def _identity(value: Any) -> Any:
    return value
