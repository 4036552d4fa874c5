"""The `mpu` that DeepSpeed is given: Megatron-core's groups under the names DeepSpeed asks for.

Not `parallel_state` itself: DeepSpeed wants `get_model_parallel_*` to span everything that holds
different weights of one replica, without the sequence axis, and wants `get_sequence_*`, which
Megatron-core has under the name of context parallelism. It also takes any object that has an
attribute `initialize_sequence_parallel` for one without model parallelism, so there is none.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state as state


class DeepSpeedMPU:
    """Megatron-core's `parallel_state`, as `deepspeed.initialize(mpu=...)` wants to see it."""

    get_tensor_model_parallel_group = staticmethod(state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_src_rank = staticmethod(state.get_tensor_model_parallel_src_rank)

    get_pipeline_model_parallel_group = staticmethod(state.get_pipeline_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(
        state.get_pipeline_model_parallel_world_size
    )

    get_data_parallel_group = staticmethod(state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(state.get_data_parallel_world_size)

    get_sequence_parallel_group = staticmethod(state.get_context_parallel_group)
    get_sequence_parallel_rank = staticmethod(state.get_context_parallel_rank)
    get_sequence_parallel_world_size = staticmethod(state.get_context_parallel_world_size)

    get_model_parallel_group = staticmethod(state.get_model_parallel_group)

    @staticmethod
    def get_model_parallel_rank() -> int:
        return dist.get_rank(state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        return dist.get_world_size(state.get_model_parallel_group())

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        return dist.get_process_group_ranks(state.get_data_parallel_group())

    @staticmethod
    def get_sequence_data_parallel_group() -> dist.ProcessGroup:
        return state.get_data_parallel_group(with_context_parallel=True)

    @staticmethod
    def get_sequence_data_parallel_rank() -> int:
        return state.get_data_parallel_rank(with_context_parallel=True)

    @staticmethod
    def get_sequence_data_parallel_world_size() -> int:
        return state.get_data_parallel_world_size(with_context_parallel=True)
