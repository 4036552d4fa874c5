"""The `mpu` that DeepSpeed is given: the mesh's groups under the names that DeepSpeed asks for.

Not Megatron-core's `parallel_state`: DeepSpeed wants `get_model_parallel_*` to span everything that
holds different weights of one replica, without the sequence axis, and wants `get_sequence_*`, which
Megatron-core has under the name of context parallelism. It also takes any object that has an
attribute `initialize_sequence_parallel` for one without model parallelism, so there is none.
"""

from __future__ import annotations

import torch.distributed as dist

from megalong.parallel.mesh import Mesh


class DeepSpeedMPU:
    """The mesh as `deepspeed.initialize(mpu=...)` wants to see it: for each of its axes a group
    (`get_..._group`), this rank's place in it (`get_..._rank`), and its size
    (`get_..._world_size`).

    tensor_model_parallel, pipeline_model_parallel: Megatron-core's axes. model_parallel: the
    ranks that hold the parts of one replica. data_parallel: those that see different samples.
    sequence_parallel: those that see different positions of the same samples.
    sequence_data_parallel: those that hold the same part of the weights, which ZeRO partitions.
    `..._src_rank` and `..._group_ranks` are numbers of ranks in the whole launch.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.tensor_group)

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.tensor_group)

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self._mesh.tensor_group)[0]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.pipeline_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.pipeline_group)

    def get_pipeline_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.pipeline_group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.model_group

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.model_group)

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.model_group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.data_group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.data_group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.data_group)

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.sequence.group

    def get_sequence_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.sequence.group)

    def get_sequence_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.sequence.group)

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.replica_group

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self._mesh.replica_group)

    def get_sequence_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._mesh.replica_group)
