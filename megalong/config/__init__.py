"""The whole configuration: one dataclass a section, from which flags, YAML file and checks derive.

One field is one flag (`num_layers` is `--num-layers`), with Megatron's name where Megatron has one.
`megalong.config.arguments` reads the command line and `--config FILE.yaml`; `Config.resolve` fills
in what was left open and refuses what cannot work, before anything is built or launched. A `Config`
never changes after that; the resolved one is written into the run folder and can be read again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megalong.config.attention import AttentionConfig
from megalong.config.data import DataConfig
from megalong.config.flags import changed_fields, flag_name, shown
from megalong.config.memory import MemoryConfig
from megalong.config.model import ModelConfig
from megalong.config.parallel import ParallelConfig, world_size
from megalong.config.run import RunConfig, SamplesConfig, TasksConfig
from megalong.config.training import TrainingConfig

__all__ = [
    "AttentionConfig", "Config", "DataConfig", "MemoryConfig", "ModelConfig", "ParallelConfig",
    "RunConfig", "SamplesConfig", "TasksConfig", "TrainingConfig", "flag_name", "unused",
    "world_size",
]  # fmt: skip

# Of each optimizer that has settings of its own, who uses them: Muon steps the rest with AdamW.
_USERS = {"adam": ("adam", "muon"), "sgd": ("sgd",), "muon": ("muon",)}


@dataclass(frozen=True)
class Config:
    """The settings of a run, by section."""

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
        """Fill in every default that depends on another field.

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
        model, training, parallel = resolved.model, resolved.training, resolved.parallel
        model.check()
        model.check_positions(training.precision, training.causal)
        heads = model.num_attention_heads, model.num_query_groups, model.seq_length
        resolved.attention.check(*heads, model.num_layers)
        resolved = dataclasses.replace(
            resolved, attention=resolved.attention.with_matched_flops(*heads, training.causal)
        )
        training.check(data_parallel_size)
        microbatches = resolved.num_microbatches(data_parallel_size)
        parallel.check(model, training.global_batch_size, microbatches)
        training.check_optimizer(parallel.zero_stage)
        resolved.memory.check(model, parallel)
        memory = resolved.memory.resolve(model, parallel)
        resolved = dataclasses.replace(resolved, memory=memory)
        resolved.run.check(training, world_size)
        resolved.data.check(training.causal, model.seq_length)
        resolved.tasks.check(model.seq_length, training.causal)
        resolved.samples.check(training.causal)
        return resolved

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Return the micro batches of an optimizer step on one rank (after `resolve`)."""
        assert self.training.global_batch_size is not None
        return self.training.global_batch_size // (
            self.training.micro_batch_size * data_parallel_size
        )


def unused(given: Config) -> Iterator[str]:
    """Say, a line each, what was set and does nothing beside the other settings: presets and files
    for several runs may have it. given: as it was set, before it was resolved."""

    def lines(section: Any, names: Iterable[str], why: str) -> Iterator[str]:
        for name in changed_fields(section, *names):
            value = getattr(section, name)
            words = "" if value is True else f" {shown(value)}"
            yield f"{flag_name(name)}{words} is not used: {why}"

    training, model, run = given.training, given.model, given.run
    for optimizer, users in _USERS.items():
        names = [name for name in vars(training) if name.startswith(f"{optimizer}_")]
        if training.optimizer not in users:
            yield from lines(training, names, f"--optimizer is {training.optimizer}")
    style = f"--lr-decay-style is {training.lr_decay_style}"
    if training.lr_decay_style == "constant":
        yield from lines(training, ["min_lr", "lr_decay_iters"], style)
    if training.lr_decay_style != "polynomial":
        yield from lines(training, ["lr_decay_power"], style)
    if training.precision != "fp16":
        names = ["loss_scale", "initial_loss_scale"]
        yield from lines(training, names, f"--precision is {training.precision}")
    positions = f"--position-embedding-type is {model.position_embedding_type}"
    if model.position_embedding_type != "xpos":
        yield from lines(model, ["xpos_scale_base"], positions)
    if model.position_embedding_type == "none":
        yield from lines(model, ["rotary_base"], positions)
    if run.load is None and run.pretrained_checkpoint is None:
        why = "there is no --load"
        yield from lines(training, ["use_checkpoint_opt_param_scheduler"], why)
        yield from lines(run, ["load_fallback"], why)
