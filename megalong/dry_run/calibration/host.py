"""What the program around an operator takes: Python, modules, autograd, DeepSpeed, the call."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from unittest import mock

import torch.distributed as dist

from megalong.config import Config
from megalong.config.arguments import config_from_values
from megalong.data.batches import Batch
from megalong.dry_run.calibration.clock import Clock
from megalong.dry_run.kernels import InsideAttention
from megalong.dry_run.parts import Parts
from megalong.dry_run.recorder import WorkRecorder
from megalong.dry_run.step import host_batches
from megalong.model.build import build_model
from megalong.parallel.cpu import enable_megatron_without_gpu
from megalong.parallel.deepspeed_private import skip_shared_memory_kernels
from megalong.parallel.mesh import build_mesh
from megalong.training.engine import TrainingEngine

# So little to compute that what is around it is all there is.
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "make_vocab_size_divisible_by": 1,
    "seq_length": 32,
    "segment_lengths": (16, 32),
    "dilation_rates": (1, 2),
    "memory_path": "off",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
VOCABULARY = 64
STEPS = 10


def call_seconds(clock: Clock) -> float:
    """Seconds of the host for each kernel and collective of `Work.launches`, in a step of the
    training's own engine whose tensors are tiny. To be called by all ranks."""
    with small_engine(clock) as engine:
        batches = host_batches(small_config(clock), engine.mesh)
        for _ in range(3):  # the second counts its traffic
            engine.train_step(batches, 0.0)
        launches = step_launches(engine, batches)
        now = time.perf_counter if clock.device.type == "cuda" else time.thread_time
        times = []
        for _ in range(STEPS):
            start = now()
            engine.train_step(batches, 0.0)
            clock.wait()
            times.append(now() - start)
        return clock.slowest(min(times) / launches)


def step_launches(engine: TrainingEngine, batches: Iterator[Batch]) -> int:
    """Kernels and collectives of a step, as a dry run of it counts them."""
    recorder = WorkRecorder(Parts(), engine.mesh.groups_by_axis)
    with recorder, InsideAttention(recorder):
        engine.train_step(batches, 0.0)
    return recorder.work.launches()


def small_config(clock: Clock) -> Config:
    """Of a launch of all ranks, in the precision that the device has most use for."""
    precision = "bf16" if clock.device.type == "cuda" else "fp32"
    batches = {"micro_batch_size": 1, "global_batch_size": clock.ranks, "precision": precision}
    return config_from_values(MODEL | batches).resolve(clock.ranks)


@contextlib.contextmanager
def small_engine(clock: Clock) -> Iterator[TrainingEngine]:
    """The training's engine of this rank, in the launch's process group or one of its own."""
    config = small_config(clock)
    with _group(clock), build_mesh(config, clock.device) as mesh:
        engine = TrainingEngine(build_model(config, VOCABULARY, mesh), config, mesh)
        try:
            yield engine
        finally:
            engine.deepspeed.destroy()


@contextlib.contextmanager
def _group(clock: Clock) -> Iterator[None]:
    """The launch's process group, or one of this process alone."""
    if clock.device.type == "cpu":
        enable_megatron_without_gpu()
        skip_shared_memory_kernels()
    if dist.is_initialized():
        yield
        return
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    backend = "cpu:gloo,cuda:nccl" if clock.device.type == "cuda" else "gloo"
    with mock.patch.dict(os.environ, names):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
