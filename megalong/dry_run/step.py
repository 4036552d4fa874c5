"""A training step of one rank of a launch of any size, run on a device that is not there.

That is a GPU (`fake_device`). Without the fake device the rank is one of a launch on the CPU, as
training itself takes the CPU where there is no GPU, or DS_ACCELERATOR is cpu: attention,
optimizer and temporaries are that launch's (tests/dry_run/test_predictions.py compares the two).

The step is the training's own: TrainingEngine, Megatron-core's schedule, DeepSpeed's optimizer.
Its collectives send nothing. What would stop a GPU (`fake_tensors.HostSyncs`) or fail on one
(tensors on the wrong device) stops it here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megalong.config import Config
from megalong.config.training import keeps_optimizer_on_host
from megalong.data.batches import Batch
from megalong.dry_run import fake_device
from megalong.dry_run.fake_tensors import (
    HostSyncs,
    NoKernels,
    Wait,
    fake_device_tensors,
    forget_tables,
)
from megalong.dry_run.layouts import check_offload
from megalong.dry_run.memory import BLOCK, DeviceMemory
from megalong.dry_run.recorder import Parts, WorkRecorder
from megalong.dry_run.share import lone_mesh
from megalong.dry_run.work import Operation, Work
from megalong.model.build import build_model
from megalong.model.chunked import rows
from megalong.model.memory_path import Room, choose_memory_path
from megalong.parallel.deepspeed_private import (
    held,
    held_gradients,
    stepping_optimizer,
)
from megalong.parallel.mesh import Mesh
from megalong.parallel.schedule import run_schedule
from megalong.parallel.traffic import Counts
from megalong.training.engine import TrainingEngine, weights_divider
from megalong.utils.machine import use_gpu


@contextlib.contextmanager
def few_tiles(memory: DeviceMemory, recorder: WorkRecorder) -> Iterator[None]:
    """Inside, every loop over more than three tiles has three, and what memory and recorder see of
    the middle one counts as often as there are tiles between the first and the last."""

    def few(count: int, size: int) -> Iterator[slice]:
        every = list(rows.tiles(count, size))
        if len(every) <= 3:
            yield from every
            return
        yield every[0]
        between, start = len(every) - 2, memory.moment
        with recorder.repeating(between):
            yield every[1]
        stop = memory.moment
        yield every[-1]
        # Only now nothing of the middle tile is held but what the loop keeps of every tile.
        memory.repeat(start, stop, between)

    loaded = [module for name, module in sys.modules.items() if name.startswith("megalong.")]
    with contextlib.ExitStack() as stack:
        for module in loaded:
            if module is not rows and getattr(module, "tiles", None) is rows.tiles:
                stack.enter_context(mock.patch.object(module, "tiles", few))
        yield


# Where a step waits for the device, and why: but for what a flag asks for, none of it is ours.
# Everything else is an error.
ALLOWED = tuple(
    Wait(where, why)
    for where, why in {
        "megalong/training/engine.py:_usual_loss": "--skip-loss-spikes needs the loss",
        **{
            f"deepspeed/runtime/{where}": why
            for where, why in {
                "utils.py:mask_nan_or_inf_with_val_inplace": "a number is copied to the device",
                "utils.py:is_invalid_grad_norm": "whether the norm is finite",
                "zero/stage_1_and_2.py:has_overflow": "whether all gradients are finite",
                "zero/stage_1_and_2.py:get_grad_norm_direct": "a zero is made on the host",
                "zero/stage3.py:independent_gradient_partition_epilogue": "for its own stream",
                "zero/stage3.py:get_grad_norm_direct": "sums of norms are made on the host",
                # With the optimizer on the host:
                "zero/stage_1_and_2.py:update_offload_overflow_tracker": "finite gradients",
                "zero/stage_1_and_2.py:_wait_for_offload_copies": "a copy before the next one",
                "zero/stage_1_and_2.py:complete_grad_norm_calculation_for_cpu_offload": "norms",
                "zero/stage3.py:complete_grad_norm_calculation_for_cpu_offload": "norms",
                "zero/stage3.py:_reassign_or_swap_out_partitioned_parameters": "new weights",
            }.items()
        },
        "deepspeed/accelerator/cuda_accelerator.py:synchronize": "ZeRO 3's small weights",
    }.items()
)

# What the last stage does after the last micro batch for each of them.
SUM_OF_LOSSES = Operation(
    part="optimizer",
    direction="update",
    kind="memory",
    name="aten.add",
    dtype="float32",
    flops=0,
    bytes=12,
)

# Where DeepSpeed's ZeRO 3 compares what the ranks are about to do, in its first two forward passes,
# which are over before the step that is reported: the others are not there to be asked.
COMPARISONS = tuple(
    f"deepspeed.runtime.zero.{module}.assert_ints_same_as_other_ranks"
    for module in ("partition_parameters", "partitioned_param_coordinator", "stage3")
)


@dataclass(frozen=True)
class DryRun:
    """What a step of one rank needs.

    work: its operations and collectives.
    memory: bytes of the device at the peak, by kind (`megalong.dry_run.work.MEMORY`).
    host: bytes of the host's memory at the peak of a step: activations that wait there, with
        --offload-activations, and an optimizer that a DeepSpeed file has put there.
    another: what one more micro batch adds to the work, or of the interleaved schedule one more
        group of them, where there were enough to tell (`steady_microbatches`); None else.
    waits: how often the host waits for the device in a step, by the function that waits.
    """

    work: Work
    memory: Counter[str]
    host: int
    another: Work | None = None
    waits: Counter[str] = field(default_factory=Counter)

    @property
    def flops(self) -> Counter[tuple[str, str]]:
        """Executed, by part and direction, of those that have some."""
        return Counter({key: flops for key, flops in self.work.flops().items() if flops})

    @property
    def traffic(self) -> Counts:
        """By axis and collective, as `megalong.parallel.traffic` counts."""
        return self.work.traffic()


def dry_run(
    config: Config,
    vocab_size: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    prepare: Callable[[TrainingEngine], None] = lambda _: None,
    quick: bool = False,
) -> DryRun:
    """Training steps of rank `rank` of a launch of `ranks` up to the first that is like all that
    follow (the second, with ZeRO 3 perhaps the third), which is reported; and the forward pass of
    an evaluation.

    config: resolved for as many ranks; data and tokenizer are not opened. `--memory-path auto` is
        what it is on such a device, with a host that has room for everything.
    prepare: is given the engine before its first step.
    quick: no evaluation, nobody looks for waits, three tiles of many (`few_tiles`), and one step
        where the second does the same (two with ZeRO 3, which has to see what it will be asked
        for): the rest of the result is the same, with the small operations besides in which a first
        step makes tables.
    Raises HostSync, WrongDevice, or PyTorch's FakeTensorDeviceMismatchError; UserError where a
    DeepSpeed file offloads what cannot be planned (`zero_offload`).
    """
    check_offload(config)
    forget_tables()
    memory = DeviceMemory(unpinned=keeps_optimizer_on_host(config.training.deepspeed_config))
    parts = Parts()
    with fake_rank(config, rank, ranks) as mesh, memory:
        replicas = mesh.data_parallel_size * mesh.sequence.size
        device = fake_device.MEMORY if use_gpu() else math.inf
        room = Room(device, host=math.inf, on_gpu=use_gpu(), replicas=replicas)
        config, _ = choose_memory_path(config, vocab_size, room)
        engine = fake_engine(config, vocab_size, mesh, memory)
        prepare(engine)
        memory.begin_steps()
        batches, begun = host_batches(config, mesh), []
        steps = engine.counted_step
        if quick:
            steps = 1 if config.parallel.zero_stage < 3 else 2
        with parts.watch(engine.model):
            for number in range(steps):
                syncs = HostSyncs(ALLOWED if number and not quick else None)
                recorder = WorkRecorder(parts, mesh.groups_by_axis, memory)
                begun.clear()
                with contextlib.ExitStack() as stack:
                    for context in (syncs, recorder, NoKernels(recorder)):
                        stack.enter_context(context)
                    stack.enter_context(_telling_when_updating(engine, memory, recorder))
                    if quick:
                        stack.enter_context(few_tiles(memory, recorder))
                    engine.train_step(_noting(batches, recorder, begun), config.training.lr)
                memory.end_update()
        if not quick:
            with HostSyncs(ALLOWED):
                engine.token_losses([next(batches)])
    first, group = steady_microbatches(config, mesh.pipeline_parallel_rank)
    another = None
    if first + group < len(begun):
        another = begun[first + group].plus(begun[first], -1)
        if mesh.is_last_stage:
            another.operations[SUM_OF_LOSSES] += group
    return DryRun(
        work=recorder.work,
        memory=memory.peak,
        host=memory.host_peak,
        another=another,
        waits=syncs.counts,
    )


def planned_step(config: Config, vocab_size: int, *, rank: int = 0, ranks: int = 1) -> DryRun:
    """Return the `dry_run` of a step of this rank, with few of its micro batches run.

    Run are as many as fill the pipeline, and a few more; each further one does what one in the
    middle did (`DryRun.another`), and the peak of memory has come by then.
    """
    replicas = config.parallel.data_parallel_size(ranks)
    microbatches = config.num_microbatches(replicas)
    stages = config.parallel.pipeline_model_parallel_size
    stage = rank * stages // ranks
    first, group = steady_microbatches(config, stage)
    few = min(first + group + 1, microbatches)
    batch = few * replicas * config.training.micro_batch_size
    training = dataclasses.replace(config.training, global_batch_size=batch)
    short = dataclasses.replace(config, training=training)
    step = dry_run(short, vocab_size, rank=rank, ranks=ranks, quick=True)
    if few == microbatches:
        return step
    assert step.another is not None
    work = step.work.plus(step.another, (microbatches - few) // group)
    memory = step.memory.copy()
    if stage == stages - 1:
        memory["activations"] += BLOCK * (microbatches - few)  # the losses to report
    return dataclasses.replace(step, work=work, memory=memory)


def steady_microbatches(config: Config, stage: int) -> tuple[int, int]:
    """Number, from 0, of a micro batch from whose beginning on a pipeline stage does the same over
    and over, and for how many micro batches it does so: one, or with the interleaved schedule,
    which takes them in groups, one for each stage.

    The pipeline is filled by then, and gradients are there to be added to: by the second micro
    batch after those that fill it; interleaved, where up to 2 (stages - 1) passes, and a group but
    for its last chunk, come before the first backward pass, by the last of the third group.
    """
    stages = config.parallel.pipeline_model_parallel_size
    if config.parallel.num_layers_per_virtual_pipeline_stage is None:
        return stages - stage, 1
    return 3 * stages - 1, stages


def _noting(batches: Iterator[Batch], recorder: WorkRecorder, begun: list[Work]) -> Iterator[Batch]:
    """The batches; and what had been done when each was asked for."""
    for batch in batches:
        begun.append(Work().plus(recorder.work))
        yield batch


@contextlib.contextmanager
def _telling_when_updating(
    engine: TrainingEngine, memory: DeviceMemory, recorder: WorkRecorder
) -> Iterator[None]:
    """Inside, the end of a schedule begins the update."""

    def run(*args: Any, **kwargs: Any) -> Any:
        results = run_schedule(*args, **kwargs)
        parameters = list(engine.model.parameters())
        memory.are((x for p in parameters for x in held_gradients(p)), "gradients")
        memory.begin_update()
        recorder.updating = True
        return results

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        of_groups = (p.grad for group in optimizer.param_groups for p in group["params"])
        memory.are((gradient for gradient in of_groups if gradient is not None), "gradients")

    hook = stepping_optimizer(engine.deepspeed).register_step_pre_hook(before_step)
    with mock.patch("megalong.training.engine.run_schedule", run):
        try:
            yield
        finally:
            hook.remove()


@contextlib.contextmanager
def fake_rank(config: Config, rank: int, ranks: int) -> Iterator[Mesh]:
    """This process is one rank of so many, whose collectives send nothing, on a fake device."""
    new_group = dist.new_group

    def new_group_of_mine(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Of the groups of others, which every rank of a launch has to make too, nobody hears."""
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "new_group", new_group_of_mine))
        mesh = stack.enter_context(lone_mesh(config, rank, ranks))
        stack.enter_context(fake_device_tensors())
        for name in COMPARISONS:
            stack.enter_context(mock.patch(name, lambda _: None))
        yield mesh


def fake_engine(
    config: Config, vocab_size: int, mesh: Mesh, memory: DeviceMemory | None = None
) -> TrainingEngine:
    """The engine of this rank; its weights have no values."""
    memory = memory or DeviceMemory()
    with memory.during("weights"):
        divide = weights_divider(config, mesh)
        model = build_model(config, vocab_size, mesh, initialize=False, divide=divide)
    with memory.during("optimizer"):
        engine = TrainingEngine(model, config, mesh)
    memory.are((x for p in model.parameters() for x in held(p)), "weights")
    return engine


def host_batches(config: Config, mesh: Mesh) -> Iterator[Batch]:
    """Micro batches without end, as `megalong.data.batches` makes them, all of token 0."""
    start, stop = mesh.sequence_range(config.model.seq_length)
    tokens = torch.zeros(config.training.micro_batch_size, stop - start, dtype=torch.int64)
    batch, causal = {"tokens": tokens, "labels": tokens}, config.training.causal
    if config.data.isolates_documents:
        batch["document_start"] = tokens.int()
        if not causal:
            batch["document_stop"] = torch.full_like(tokens, config.model.seq_length).int()
    if config.data.eod_mask_loss or not causal or config.data.masks_loss:
        batch["predicted"] = torch.ones((), dtype=torch.int64)
    while True:
        yield {**batch, "positions": torch.arange(start, stop)}
