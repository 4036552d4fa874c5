"""The whole configuration: one dataclass a section, from which flags, YAML file and checks derive.

One field is one flag (`num_layers` is `--num-layers`), with Megatron's name where Megatron has one.
`megalong.config.arguments` reads the command line and `--config FILE.yaml`; `Config.resolve` fills
in what was left open and refuses what cannot work, before anything is built or launched. A `Config`
never changes after that; the resolved one is written into the run folder and can be read again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megalong.config.attention import AttentionConfig
from megalong.config.data import DataConfig
from megalong.config.flags import flag_name
from megalong.config.memory import MemoryConfig
from megalong.config.model import ModelConfig
from megalong.config.parallel import ParallelConfig, world_size
from megalong.config.run import RunConfig
from megalong.config.samples import SamplesConfig
from megalong.config.tasks import TasksConfig
from megalong.config.training import TrainingConfig

__all__ = [
    "AttentionConfig",
    "Config",
    "DataConfig",
    "MemoryConfig",
    "ModelConfig",
    "ParallelConfig",
    "SamplesConfig",
    "TasksConfig",
    "TrainingConfig",
    "flag_name",
    "world_size",
]


@dataclass(frozen=True)
class Config:
    """Everything a run is, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def resolve(self, world_size: int) -> Config:
        """This configuration, with every default that depends on another field filled in.

        Raises UserError where the result cannot work on `world_size` ranks.
        """
        data_parallel_size = self.parallel.data_parallel_size(world_size)
        resolved = dataclasses.replace(
            self,
            model=self.model.resolve(),
            attention=self.attention.resolve(self.model.seq_length),
            parallel=self.parallel.resolve(),
            training=self.training.resolve(data_parallel_size),
            data=self.data.resolve(),
            tasks=self.tasks.resolve(self.model.seq_length, self.run.eval_interval),
            samples=self.samples.resolve(self.run.eval_interval),
            run=self.run.resolve(),
        )
        model, training = resolved.model, resolved.training
        model.check()
        model.check_positions(training.precision, training.causal)
        heads = model.num_attention_heads, model.num_query_groups, model.seq_length
        resolved.attention.check(*heads, model.num_layers)
        resolved = dataclasses.replace(
            resolved, attention=resolved.attention.with_matched_flops(*heads, training.causal)
        )
        training.check(data_parallel_size)
        resolved.parallel.check(
            model, training.global_batch_size, resolved.num_microbatches(data_parallel_size)
        )
        training.check_optimizer(resolved.parallel.zero_stage)
        resolved.memory.check(model, resolved.parallel)
        resolved = dataclasses.replace(
            resolved, memory=resolved.memory.resolve(model, resolved.parallel)
        )
        resolved.run.check(training, world_size)
        resolved.data.check(training.causal, model.seq_length)
        resolved.tasks.check(model.seq_length, training.causal)
        resolved.samples.check(training.causal)
        return resolved

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro batches of one optimizer step on one rank (after `resolve`)."""
        assert self.training.global_batch_size is not None
        return self.training.global_batch_size // (
            self.training.micro_batch_size * data_parallel_size
        )
