"""One rank's exact share of a launch of any size, in one process: real tensors, the real plan, the
real kernels, and neighbours who are not there.

    with share(config, 517, 1024, SyntheticRows()) as mesh:
        engine = TrainingEngine(build_model(config, vocab_size, mesh), config, mesh)

The program is not touched: its collectives end in PyTorch's backend "fake", which sends nothing.
What they carry along the sequence is then filled in by `megalong.dry_run.share`. All other
collectives end as the backend leaves them: a sum is what this rank has put in, and what is gathered
is that over and over; where it is gathered in place, the others' part stays as it was, as if their
optimizers had taken no step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from unittest import mock

import torch
import torch.distributed as dist

from megalong.attention.exchange import SequenceGroup
from megalong.config import Config
from megalong.data.batches import Batch
from megalong.parallel.cpu import enable_megatron_without_gpu
from megalong.parallel.deepspeed_private import skip_shared_memory_kernels
from megalong.parallel.mesh import Mesh, build_mesh
from megalong.utils.machine import use_gpu
from megalong.utils.torch_private import FakeStore

TABLE = 2**12  # different rows that are drawn
LIST = 2**31  # more rows than a rank puts into any list

Group = tuple[int, ...]  # its ranks


class SyntheticRows:
    """Rows of normal numbers, with the root mean square of what this rank itself has put in.

    A row is told by the rank that it is from and its place in that rank's list, and by nothing
    else: whoever gets it gets the same one, in any run. What the others add to a sum is one such
    row for all of them together.
    """

    def __init__(self, seed: int = 0):
        self._seed = seed
        self._tables: dict[tuple, torch.Tensor] = {}
        self._lines: dict[tuple, torch.Tensor] = {}

    def answer(self, exchanged: Exchanged) -> None:
        result, me, own = exchanged.result, exchanged.me, exchanged.put_in
        if not len(result):
            return
        if exchanged.kind == "reduce_scatter":
            result += self._rows(exchanged.ranks[me : me + 1], [len(result)], own)
            return
        counts = exchanged.received or [len(own)] * len(exchanged.ranks)
        rows = self._rows(exchanged.ranks, counts, own)
        if exchanged.kind == "all_gather":
            rows[me * len(own) : (me + 1) * len(own)] = own
        result.copy_(rows)

    def _rows(self, ranks: Sequence[int], counts: Sequence[int], own: torch.Tensor) -> torch.Tensor:
        """The lists of some ranks, of so many rows each, one after the other."""
        size = own.float().square().mean().sqrt().nan_to_num(1.0)  # of none it is not a number
        table = self._table(own) * size.to(own.dtype)
        return table[self._lines_of(tuple(ranks), tuple(counts), own.device)]

    def _table(self, like: torch.Tensor) -> torch.Tensor:
        shape = TABLE, *like.shape[1:]
        key = shape, like.dtype, like.device
        if key not in self._tables:
            generator = torch.Generator().manual_seed(self._seed)
            self._tables[key] = torch.randn(shape, generator=generator).to(like)
        return self._tables[key]

    def _lines_of(
        self, ranks: Group, counts: tuple[int, ...], device: torch.device
    ) -> torch.Tensor:
        """Which line of the table each row is."""
        key = ranks, counts, device
        if key not in self._lines:
            rows = torch.tensor(counts)
            places = torch.arange(sum(counts)) - (rows.cumsum(0) - rows).repeat_interleave(rows)
            numbers = torch.tensor(ranks).repeat_interleave(rows) * LIST + places
            self._lines[key] = ((numbers * SPREADS >> 40) % TABLE).to(device)
        return self._lines[key]


SPREADS = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, signed: its products differ in all bits


@contextlib.contextmanager
def lone_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process is one rank of so many, the only one; its collectives send nothing.

    Raises ValueError where there is no such rank.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks}: they count from 0")
    names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": ranks}
    environment = {name: str(value) for name, value in names.items()}
    with mock.patch.dict(os.environ, environment):
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def share(
    config: Config, rank: int, ranks: int, neighbours: Neighbours, clock: Clock | None = None
) -> Iterator[Mesh]:
    """The mesh of one rank of a launch, whose neighbours along the sequence are these.

    config: resolved for so many ranks.
    """
    with lone_mesh(config, rank, ranks) as mesh, answered(mesh.sequence, neighbours, clock):
        yield mesh


@contextlib.contextmanager
def lone_mesh(config: Config, rank: int, ranks: int) -> Iterator[Mesh]:
    """The mesh of the only rank there is (`lone_rank`), on the GPU where there is one."""
    device = torch.device("cuda", 0) if use_gpu() else torch.device("cpu")
    if not use_gpu():
        enable_megatron_without_gpu()
        skip_shared_memory_kernels()
    with lone_rank(rank, ranks), build_mesh(config, device) as mesh:
        yield mesh


def lone_sequence(subgroup_sizes: Sequence[int]) -> SequenceGroup:
    """All ranks share one sequence, seen from the only one there is, inside `lone_rank`: as
    `SequenceGroup.create`, which asks all ranks and wants time that grows with their square."""
    rank, size = dist.get_rank(), dist.get_world_size()
    subgroups = {size: dist.group.WORLD}
    for m in sorted(set(subgroup_sizes) - {1, size}):
        first = rank // m * m
        members = list(range(first, min(first + m, size)))
        subgroups[m] = dist.new_group(members, use_local_synchronization=True)
    return SequenceGroup(rank, size, dist.group.WORLD, subgroups)


def numbered_batches(config: Config, vocab_size: int, mesh: Mesh) -> Iterator[Batch]:
    """Micro batches without end, all the same; as `megalong.data.batches` makes them. Which token
    stands at a position hangs on that position alone, so that no rank needs another's."""
    start, stop = mesh.sequence_range(config.model.seq_length)
    positions = torch.arange(start, stop + 1)
    tokens = (positions * SPREADS >> 33) % vocab_size
    rows = tokens.expand(config.training.micro_batch_size, -1)
    batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:], "positions": positions[:-1]}
    while True:
        yield batch


@dataclass(frozen=True)
class Exchanged:
    """One collective along the sequence, as it stands when this rank's part is in its place.

    kind: "all_gather", "reduce_scatter" or "all_to_all". ranks: of the group, numbers of the
    launch; me: the place of this rank among them. put_in: what this rank sends.
    result: what it will find: of an all-gather the lists of all ranks, one after the other; of a
        reduce-scatter the sums of its own rows, so far what it has found itself; of an all-to-all
        what each of the others has for it, so far nothing that means anything.
    sent, received: of an all-to-all, rows to and from each rank of the group.
    """

    kind: str
    ranks: Sequence[int]
    me: int
    put_in: torch.Tensor
    result: torch.Tensor
    sent: Sequence[int] = ()
    received: Sequence[int] = ()

    def part_of(self, place: int) -> torch.Tensor:
        """What of the rows put in goes to the rank at a place of the group."""
        if self.kind == "all_gather":
            return self.put_in
        if self.kind == "reduce_scatter":
            return self.put_in.chunk(len(self.ranks))[place]
        return self.put_in.split(list(self.sent))[place]


class Neighbours(Protocol):
    """The other ranks of a sequence."""

    def answer(self, exchanged: Exchanged) -> None:
        """Put into `result` what the others have for this rank, in place."""
        ...


class Clock:
    """Seconds spent on filling in what others would have sent: a device is waited for before and
    after, where `waits`."""

    def __init__(self, waits: bool = False):
        self.seconds, self.waits = 0.0, waits

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds += self._now() - start

    def _now(self) -> float:
        if self.waits and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def answered(
    sequence: SequenceGroup, neighbours: Neighbours, clock: Clock | None = None
) -> Iterator[None]:
    """Inside, `neighbours` fill in what is exchanged along the sequence. An engine is built inside,
    too, since DeepSpeed asks for PyTorch's functions only once."""
    groups = {id(group) for group in (sequence.group, *sequence.subgroups.values())}
    answers = _Answers(groups, neighbours, clock or Clock())
    with contextlib.ExitStack() as stack:
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single"):
            function = partial(getattr(answers, name), getattr(dist, name))
            stack.enter_context(mock.patch.object(dist, name, function))
        yield


@dataclass(frozen=True)
class _Answers:
    """Collectives of `torch.distributed`, by the names that they have there; each is given the
    original, which is what counts calls and bytes."""

    groups: set[int]  # ids of those of the sequence
    neighbours: Neighbours
    clock: Clock

    def all_gather_into_tensor(
        self, original, output_tensor, input_tensor, group=None, async_op=False
    ):
        places = [x.untyped_storage().data_ptr() for x in (output_tensor, input_tensor)]
        before = output_tensor.clone() if places[0] == places[1] else None
        work = original(output_tensor, input_tensor, group=group, async_op=async_op)
        if before is not None:
            output_tensor.copy_(before)
        self._answer(group, "all_gather", input_tensor, output_tensor)
        return work

    def reduce_scatter_tensor(
        self, original, output, input, op=dist.ReduceOp.SUM, group=None, async_op=False
    ):
        work = original(output, input, op, group=group, async_op=async_op)
        self._answer(group, "reduce_scatter", input, output)
        return work

    def all_to_all_single(
        self, original, output, input, output_split_sizes=None, input_split_sizes=None, group=None,
        async_op=False,
    ):  # fmt: skip
        given, splits = input, (output_split_sizes, input_split_sizes)
        if not len(input) and len(output):  # the backend copies it, and refuses to copy nothing
            given, splits = torch.zeros_like(output), (output_split_sizes, output_split_sizes)
        work = original(output, given, *splits, group=group, async_op=async_op)
        self._answer(group, "all_to_all", input, output, input_split_sizes, output_split_sizes)
        return work

    @torch.no_grad()
    def _answer(self, group: Any, kind: str, put_in, result, sent=(), received=()) -> None:
        if id(group) not in self.groups:
            return
        ranks = dist.get_process_group_ranks(group)
        me = dist.get_group_rank(group, dist.get_rank())
        with self.clock.running():
            self.neighbours.answer(Exchanged(kind, ranks, me, put_in, result, sent, received))
