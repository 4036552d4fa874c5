"""How the ranks divide the work: all parallel degrees in one object, and every rule they obey.

The axes are tensor (innermost), sequence, data and pipeline; the data-parallel size is what the
other three leave of the ranks. `ParallelConfig.check` refuses what cannot work, before anything is
launched, and says which layout would.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

from megalong.config.flags import flag, largest_divisor, require_positive
from megalong.config.model import ModelConfig
from megalong.utils.errors import UserError, counted


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks divide the work."""

    sequence_parallel_size: int = flag(1, "ranks that share one sequence, a shard each")
    tensor_model_parallel_size: int = flag(1, "ranks that share each layer's matrices and heads")
    pipeline_model_parallel_size: int = flag(1, "pipeline stages, each with a part of the layers")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "layers in a chunk of the interleaved pipeline schedule"
    )
    sequence_parallel: bool = flag(
        True,
        "with tensor parallelism, divide norms and residuals over the tensor ranks too (Megatron's"
        " sequence parallelism)",
    )
    zero_stage: int = flag(1, "ZeRO stage; 0 is taken for 1", choices=(0, 1, 2, 3))
    recompute_granularity: str | None = flag(
        None,
        "recompute activations in the backward pass: of the attention alone, or of whole layers",
        choices=("selective", "full"),
    )
    recompute_method: str = flag(
        "uniform",
        "with --recompute-granularity full: every group of layers, or the first ones of a stage",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = flag(
        1, "layers in a group (uniform), or layers of a stage that are recomputed (block)"
    )

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model and work on one sequence."""
        return (
            self.tensor_model_parallel_size
            * self.sequence_parallel_size
            * self.pipeline_model_parallel_size
        )

    @property
    def divides_norms(self) -> bool:
        """Whether Megatron's sequence parallelism of the norm regions is in use."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1

    @property
    def recomputes_each_layer(self) -> bool:
        """Whether every layer is recomputed by itself, from its own input."""
        return (
            self.recompute_granularity == "full"
            and self.recompute_method == "uniform"
            and self.recompute_num_layers == 1
        )

    def chunks_per_stage(self, model: ModelConfig) -> int:
        """Chunks of layers that a pipeline stage holds: one, unless the schedule is interleaved."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return 1
        stage = model.num_layers // self.pipeline_model_parallel_size
        return stage // self.num_layers_per_virtual_pipeline_stage

    def virtual_pipeline_size(self, model: ModelConfig) -> int | None:
        """Chunks per stage in Megatron-core's words, in which one is None."""
        chunks = self.chunks_per_stage(model)
        return chunks if chunks > 1 else None

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model among `world_size` ranks; UserError unless that is whole."""
        require_positive(
            self,
            "tensor_model_parallel_size",
            "sequence_parallel_size",
            "pipeline_model_parallel_size",
        )
        if world_size % self.ranks_per_replica:
            others = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
            way_out = "make the three smaller"
            if world_size % others == 0:
                fitting = largest_divisor(world_size // others, self.sequence_parallel_size)
                way_out = f"set --sequence-parallel-size {fitting}"
            raise UserError(
                f"{counted(world_size, 'rank')} cannot be shared by --tensor-model-parallel-size"
                f" {self.tensor_model_parallel_size} x --sequence-parallel-size"
                f" {self.sequence_parallel_size} x --pipeline-model-parallel-size"
                f" {self.pipeline_model_parallel_size}: start a multiple of"
                f" {counted(self.ranks_per_replica, 'rank')}, or {way_out}"
            )
        return world_size // self.ranks_per_replica

    def resolve(self) -> ParallelConfig:
        """These settings, with a ZeRO stage that can be had: DeepSpeed cannot run a backward pass
        that it does not own without a ZeRO optimizer; stage 1 on one rank is the same
        arithmetic."""
        return dataclasses.replace(self, zero_stage=max(1, self.zero_stage))

    def check(self, model: ModelConfig, global_batch_size: int, num_microbatches: int) -> None:
        """Raise UserError where this layout cannot train such a model (resolved configurations).

        num_microbatches: of one optimizer step, on one rank.
        """
        self._check_tensor(model)
        self._check_sequence(model)
        self._check_pipeline(model, global_batch_size, num_microbatches)
        self._check_recompute(model)

    def _check_tensor(self, model: ModelConfig) -> None:
        size = self.tensor_model_parallel_size
        rows = "--make-vocab-size-divisible-by", model.make_vocab_size_divisible_by
        if model.padded_vocab_size is not None:
            rows = "--padded-vocab-size", model.padded_vocab_size
        for flag_, value in (
            ("--num-attention-heads", model.num_attention_heads),
            ("--num-query-groups", model.num_query_groups),
            ("--ffn-hidden-size", model.ffn_hidden_size),
            rows,
        ):
            if value % size:
                fitting = math.gcd(value, size)  # any divisor of the size divides the ranks
                raise UserError(
                    f"{flag_} {value} does not divide by --tensor-model-parallel-size {size}, whose"
                    f" ranks share it: set --tensor-model-parallel-size {fitting}, or {flag_}"
                    f" {_next_multiple(value, size)}"
                )

    def _check_sequence(self, model: ModelConfig) -> None:
        size, length = self.sequence_parallel_size, model.seq_length
        if length % size:
            raise UserError(
                f"--seq-length {length} does not divide by --sequence-parallel-size {size}: set"
                f" --seq-length {_next_multiple(length, size)}, or --sequence-parallel-size"
                f" {largest_divisor(length, size)}"
            )
        shard, tensor = length // size, self.tensor_model_parallel_size
        if self.divides_norms and shard % tensor:
            raise UserError(
                f"a shard of --seq-length / --sequence-parallel-size = {shard} tokens does not"
                f" divide by --tensor-model-parallel-size {tensor}, over which --sequence-parallel"
                f" divides the norms: set --seq-length {_next_multiple(length, size * tensor)}, or"
                " --no-sequence-parallel"
            )

    def _check_pipeline(
        self, model: ModelConfig, global_batch_size: int, num_microbatches: int
    ) -> None:
        size, layers = self.pipeline_model_parallel_size, model.num_layers
        if layers % size:
            raise UserError(
                f"--num-layers {layers} does not divide by --pipeline-model-parallel-size {size}:"
                f" set --pipeline-model-parallel-size {largest_divisor(layers, size)}, or"
                f" --num-layers {_next_multiple(layers, size)}"
            )
        if size > 1 and self.zero_stage > 1:
            raise UserError(
                f"--zero-stage {self.zero_stage} does not work with --pipeline-model-parallel-size"
                f" {size}: its gradients cannot wait for the other micro batches of the pipeline."
                " Set --zero-stage 1, or --pipeline-model-parallel-size 1 and share the model over"
                f" --tensor-model-parallel-size {self.tensor_model_parallel_size * size} instead"
            )
        self._check_interleaved(layers // size, global_batch_size, num_microbatches)

    def _check_interleaved(
        self, stage_layers: int, global_batch_size: int, num_microbatches: int
    ) -> None:
        flag_, size = "--num-layers-per-virtual-pipeline-stage", self.pipeline_model_parallel_size
        if self.num_layers_per_virtual_pipeline_stage is None:
            return
        require_positive(self, "num_layers_per_virtual_pipeline_stage")
        layers = self.num_layers_per_virtual_pipeline_stage
        if size == 1:
            raise UserError(
                f"{flag_} {layers} interleaves the stages of a pipeline, and there is one: set"
                " --pipeline-model-parallel-size 2 or more, or leave it out"
            )
        if stage_layers % layers or layers == stage_layers:
            way_out = "leave it out"
            if stage_layers > 1:
                fitting = largest_divisor(stage_layers, min(layers, stage_layers - 1))
                way_out = f"set {flag_} {fitting}, or {way_out}"
            raise UserError(
                f"{flag_} {layers} does not cut the {stage_layers} layers of a stage into several"
                f" chunks: {way_out}"
            )
        if num_microbatches % size:
            sequences = global_batch_size // num_microbatches  # in a micro batch, over all replicas
            larger = _next_multiple(num_microbatches, size) * sequences
            raise UserError(
                f"{flag_}: the interleaved schedule takes micro batches in groups of"
                f" --pipeline-model-parallel-size {size}, and a step has {num_microbatches}: set"
                f" --global-batch-size {larger}, or leave {flag_} out"
            )

    def _check_recompute(self, model: ModelConfig) -> None:
        require_positive(self, "recompute_num_layers")
        count = self.recompute_num_layers
        if self.recompute_granularity != "full":
            if count > 1:
                raise UserError(
                    f"--recompute-num-layers {count} is for whole layers: set"
                    " --recompute-granularity full, or leave it out"
                )
            return
        layers = model.num_layers // self.pipeline_model_parallel_size
        layers //= self.chunks_per_stage(model)
        if count > layers or (self.recompute_method == "uniform" and layers % count):
            raise UserError(
                f"--recompute-num-layers {count} does not divide the {layers} layers of a pipeline"
                f" stage (or of a chunk of it): set --recompute-num-layers"
                f" {largest_divisor(layers, count)}"
            )


def world_size() -> int:
    """Number of processes of this launch, as torchrun and the deepspeed launcher announce it.

    Raises UserError where SLURM started several processes that do not know of each other.
    """
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "SLURM_PROCID" in os.environ and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} processes without RANK, WORLD_SIZE and MASTER_ADDR: start one"
            " torchrun a node (srun --ntasks-per-node=1 torchrun ...), or set the three"
        )
    return 1


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
