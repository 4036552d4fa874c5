"""How the ranks divide the work: all parallel degrees in one object, and every rule they obey.

The axes are tensor (innermost), sequence, data and pipeline; the data-parallel size is what the
other three leave of the ranks. `ParallelConfig.check` refuses what cannot work, before anything is
launched, and says which layout would.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from megalong.config.flags import flag, flag_name, largest_divisor, refuse_without, require_positive
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
        True, "divide norms and residuals over the tensor ranks too (Megatron's)"
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
        """Return the chunks of layers that a pipeline stage holds: one, unless interleaved."""
        if self.num_layers_per_virtual_pipeline_stage is None:
            return 1
        stage = model.num_layers // self.pipeline_model_parallel_size
        return stage // self.num_layers_per_virtual_pipeline_stage

    def virtual_pipeline_size(self, model: ModelConfig) -> int | None:
        """Return the chunks per stage in Megatron-core's words, in which one is None."""
        chunks = self.chunks_per_stage(model)
        return chunks if chunks > 1 else None

    def data_parallel_size(self, world_size: int) -> int:
        """Return the replicas of the model among `world_size` ranks; UserError unless whole."""
        names = (
            "tensor_model_parallel_size",
            "sequence_parallel_size",
            "pipeline_model_parallel_size",
        )
        require_positive(self, *names)
        if world_size % self.ranks_per_replica:
            others = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
            way_out = "make the three smaller"
            if world_size % others == 0:
                fitting = largest_divisor(world_size // others, self.sequence_parallel_size)
                way_out = f"set --sequence-parallel-size {fitting}"
            product = " x ".join(f"{flag_name(name)} {getattr(self, name)}" for name in names)
            raise UserError(
                f"{counted(world_size, 'rank')} cannot be shared by {product}: start a multiple of"
                f" {counted(self.ranks_per_replica, 'rank')}, or {way_out}"
            )
        return world_size // self.ranks_per_replica

    def resolve(self) -> ParallelConfig:
        """Take ZeRO stage 1 for 0: DeepSpeed cannot run a backward pass that it does not own
        without a ZeRO optimizer, and stage 1 on one rank is the same arithmetic."""
        return dataclasses.replace(self, zero_stage=max(1, self.zero_stage))

    def check(self, model: ModelConfig, global_batch_size: int, num_microbatches: int) -> None:
        """Raise UserError where this layout cannot train such a model (resolved configurations).

        num_microbatches: of one optimizer step, on one rank.
        """
        require_positive(self, "num_layers_per_virtual_pipeline_stage", "recompute_num_layers")
        self._check_tensor(model)
        self._check_sequence(model)
        self._check_pipeline(model)
        self._check_interleaved(model, global_batch_size, num_microbatches)
        self._check_recompute(model)

    def _check_tensor(self, model: ModelConfig) -> None:
        size = self.tensor_model_parallel_size
        rows = "padded_vocab_size"
        if model.padded_vocab_size is None:
            rows = "make_vocab_size_divisible_by"
        for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", rows):
            if getattr(model, name) % size:
                # Any divisor of the size divides the ranks.
                raise _odd(model, name, self, "tensor_model_parallel_size", math.gcd)

    def _check_sequence(self, model: ModelConfig) -> None:
        size, length = self.sequence_parallel_size, model.seq_length
        if length % size:
            raise _odd(model, "seq_length", self, "sequence_parallel_size", largest_divisor)
        shard, tensor = length // size, self.tensor_model_parallel_size
        if self.divides_norms and shard % tensor:
            raise UserError(
                f"a shard of --seq-length / --sequence-parallel-size = {shard} tokens does not"
                f" divide by --tensor-model-parallel-size {tensor}, over which --sequence-parallel"
                f" divides the norms: set --seq-length {_next_multiple(length, size * tensor)}, or"
                " --no-sequence-parallel"
            )

    def _check_pipeline(self, model: ModelConfig) -> None:
        size = self.pipeline_model_parallel_size
        if model.num_layers % size:
            raise _odd(model, "num_layers", self, "pipeline_model_parallel_size", largest_divisor)
        if size > 1 and self.zero_stage > 1:
            raise UserError(
                f"--zero-stage {self.zero_stage} does not work with --pipeline-model-parallel-size"
                f" {size}: its gradients cannot wait for the other micro batches of the pipeline."
                " Set --zero-stage 1, or --pipeline-model-parallel-size 1 and share the model over"
                f" --tensor-model-parallel-size {self.tensor_model_parallel_size * size} instead"
            )

    def _check_interleaved(
        self, model: ModelConfig, global_batch_size: int, num_microbatches: int
    ) -> None:
        flag_, size = "--num-layers-per-virtual-pipeline-stage", self.pipeline_model_parallel_size
        layers, stage_layers = self.num_layers_per_virtual_pipeline_stage, model.num_layers // size
        if layers is None:
            return
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
        count = self.recompute_num_layers
        if self.recompute_granularity != "full":
            missing = "--recompute-granularity full"
            return refuse_without("whole layers", missing, self, "recompute_num_layers")
        layers = model.num_layers // self.pipeline_model_parallel_size
        layers //= self.chunks_per_stage(model)
        if count > layers or (self.recompute_method == "uniform" and layers % count):
            raise UserError(
                f"--recompute-num-layers {count} does not divide the {layers} layers of a pipeline"
                f" stage (or of a chunk of it): set --recompute-num-layers"
                f" {largest_divisor(layers, count)}"
            )


def world_size() -> int:
    """Return the processes of this launch, as torchrun and the deepspeed launcher announce them.

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


def _odd(
    model: ModelConfig,
    name: str,
    parallel: ParallelConfig,
    degree: str,
    fitting: Callable[[int, int], int],
) -> UserError:
    """Make the error on a size of the model whose ranks cannot share it. fitting: computes a degree
    that works of the size and the degree."""
    value, size = getattr(model, name), getattr(parallel, degree)
    return UserError(
        f"{flag_name(name)} {value} does not divide by {flag_name(degree)} {size}, whose ranks"
        f" share it: set {flag_name(degree)} {fitting(value, size)}, or {flag_name(name)}"
        f" {_next_multiple(value, size)}"
    )


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
