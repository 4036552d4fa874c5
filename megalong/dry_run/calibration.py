"""Measurement of a device and its links (`megalong.dry_run.cluster`) where this runs.

tools/calibrate_device.py is the command.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml

from megalong.attention import operators
from megalong.attention.pattern import DilatedPattern
from megalong.config import Config
from megalong.config.arguments import config_from_values
from megalong.data.batches import Batch
from megalong.dry_run.cluster import CLUSTERS, DEVICES
from megalong.dry_run.fake_tensors import InsideAttention
from megalong.dry_run.recorder import Parts, WorkRecorder
from megalong.dry_run.step import host_batches
from megalong.model.build import build_model
from megalong.parallel.cpu import enable_megatron_without_gpu
from megalong.parallel.deepspeed_private import skip_shared_memory_kernels
from megalong.parallel.mesh import build_mesh
from megalong.training.engine import TrainingEngine

FEWEST, MOST = 5, 200  # calls
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16", "float32")}


class Clock:
    """Of one rank. Alone, where there is no process group.

    device: what the calls keep busy. budget: seconds to repeat a call for.
    """

    def __init__(self, device: torch.device, budget: float = 0.2):
        self.device, self.budget = device, budget

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def seconds(self, call: Callable[[], object]) -> float:
        """Of a call that waits for nobody, on the slowest rank: the median of repeated ones. Every
        rank makes as many.

        On a CPU it is the time that the core worked for it, so that others, who may be using the
        machine as well, do not count; a call has to be single-threaded.
        """
        return self._measured(call, time.thread_time, statistics.median)

    def seconds_together(self, call: Callable[[], object]) -> float:
        """Return the seconds of a call in which ranks wait for each other: on a CPU the shortest
        of repeated ones, where others may be in the way."""
        return self._measured(call, time.perf_counter, min)

    def _measured(
        self,
        call: Callable[[], object],
        now: Callable[[], float],
        chosen: Callable[[list[float]], float],
    ) -> float:
        call()
        calls = self._calls(self._once(call, 1))
        if self.device.type == "cuda":  # the host runs ahead: the device has no gaps
            return self.slowest(min(self._once(call, calls) for _ in range(3)) / calls)
        return self.slowest(chosen([self._once(call, 1, now) for _ in range(calls)]))

    def _calls(self, once: float) -> int:
        return max(FEWEST, min(MOST, round(self.budget / max(self.slowest(once), 1e-9))))

    def slowest(self, value: float) -> float:
        """The largest of the ranks' values."""
        if self.ranks == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _once(
        self, call: Callable[[], object], calls: int, now: Callable[[], float] = time.perf_counter
    ) -> float:
        self.wait()
        start = now()
        for _ in range(calls):
            call()
        self.wait()
        return now() - start


# (size of the call, seconds of it)
Rows = list[tuple[float, float]]
# (FLOPs of the call, bytes read and written, seconds of it)
Calls = list[tuple[float, float, float]]

PRODUCTS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (512, 1024, 2048, 4096, 8192)}
LENGTHS = {"cpu": (128, 512, 1024, 2048, 4096), "cuda": (512, 2048, 8192, 16384)}
COLD = 2**27  # bytes that no cache holds
HEADS = {"cpu": 2, "cuda": 16}
MEMORY = {
    "cpu": (2**14, 2**16, 2**18, 2**20, 2**22, 2**24),
    "cuda": (2**20, 2**24, 2**28),
}  # numbers


def products(clock: Clock, dtype: torch.dtype) -> Rows:
    """Square products: FLOPs, seconds."""
    rows = []
    for n in PRODUCTS[clock.device.type]:
        a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        rows.append((2.0 * n**3, clock.seconds(lambda a=a, b=b: a @ b)))
    return rows


def attention(clock: Clock, dtype: torch.dtype) -> tuple[Calls, Calls]:
    """Causal attention of one segment, head_dim 64, by the backend that training takes: calls of
    the forward pass, and of the backward pass."""
    heads, forward, backward = HEADS[clock.device.type], [], []
    options = {"causal": True, "scale": 0.125, "backend": "auto"}
    for n in LENGTHS[clock.device.type]:
        q, k, v, grad = (
            torch.randn(1, n, heads, 64, device=clock.device).to(dtype) for _ in range(4)
        )
        here = partial(operators.forward, q, k, v, DilatedPattern((n,), (1,)), **options)
        out, lse = here()
        back = partial(
            operators.backward, grad, q, k, v, out, lse, DilatedPattern((n,), (1,)), **options
        )
        flops = 4.0 * 64 * heads * n * (n + 1) / 2
        forward.append((flops, 4 * q.nbytes + lse.nbytes, clock.seconds(here)))
        backward.append((2.5 * flops, 8 * q.nbytes + lse.nbytes, clock.seconds(back)))
    return forward, backward


def memory(clock: Clock) -> Rows:
    """Sums of two float32 tensors into a new one: bytes read and written, seconds. The tensors are
    others at each call, since a model comes back to one after it has been through all the others:
    it is no longer in a cache."""
    rows = []
    for n in MEMORY[clock.device.type]:
        pool = [torch.ones(n, device=clock.device) for _ in range(max(2, COLD // (4 * n)))]
        pairs = itertools.cycle(zip(pool, pool[1:] + pool[:1], strict=True))
        rows.append((12.0 * n, clock.seconds(lambda pairs=pairs: torch.add(*next(pairs)))))
    return rows


def host_bandwidth(clock: Clock, size: int = 2**28) -> float:
    """Bytes/s of a copy of pinned memory of the host to a GPU, all ranks at once."""
    there = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    here = torch.empty(size, dtype=torch.uint8, device=clock.device)
    return size / clock.seconds(lambda: here.copy_(there, non_blocking=True))


def kernel_seconds(clock: Clock) -> float:
    """What a kernel takes that does nothing, on a GPU: of many in a graph, which needs no host."""
    x, count, graph = torch.ones(1, device=clock.device), 200, torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return clock.seconds(graph.replay) / count


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


SIZES = {"cpu": (2**14, 2**18, 2**21, 2**24), "cuda": (2**18, 2**22, 2**26, 2**28)}  # bytes
SMALL = 64  # bytes of a rank's part of a call that is all latency

# Of a collective of S bytes between n ranks in one node (`megalong.dry_run.cost`): bytes
# that go through a rank as a share of S, and steps.
THROUGH: dict[str, Callable[[int], tuple[float, int]]] = {
    "all_reduce": lambda n: (2 * (n - 1) / n, 2 * (n - 1)),
    "all_gather": lambda n: ((n - 1) / n, n - 1),
    "reduce_scatter": lambda n: ((n - 1) / n, n - 1),
    "all_to_all": lambda n: ((n - 1) / n, n - 1),
    "broadcast": lambda n: (1.0, n - 1),
    "send": lambda n: (1.0, 1),
}


def collective(name: str, size: int, device: torch.device) -> Callable[[], object]:
    """A call of all ranks whose larger buffer has so many bytes."""
    n = dist.get_world_size()
    whole = torch.zeros(size // 4 // n * n, device=device)
    part = torch.zeros(len(whole) // n, device=device)
    other = torch.empty_like(whole)
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": lambda: _there_and_back(whole),
    }[name]


def _there_and_back(tensor: torch.Tensor) -> None:
    """Between ranks 0 and 1, and between those that follow in pairs."""
    rank = dist.get_rank()
    other = rank ^ 1
    if other >= dist.get_world_size():
        return
    for sends in (rank < other, rank > other):
        if sends:
            dist.send(tensor, other)
        else:
            dist.recv(tensor, other)


def call_of_all(clock: Clock, name: str, size: int) -> float:
    """Of one call, which all ranks begin together."""
    call = collective(name, size, clock.device)
    found = clock.seconds_together(call)
    return found / 2 if name == "send" else found


def overlap(clock: Clock, size: int = 2**24) -> float:
    """The share of a collective's time that computation hides which runs beside it."""
    whole = torch.zeros(size // 4, device=clock.device)
    matrix = torch.ones(512, 512, device=clock.device)
    communicating = clock.seconds_together(lambda: dist.all_reduce(whole))
    products = max(1, round(communicating / clock.seconds_together(lambda: matrix @ matrix)))

    def compute() -> None:
        for _ in range(products):
            matrix @ matrix

    def both() -> None:
        work = dist.all_reduce(whole, async_op=True)
        compute()
        work.wait()

    computing, together = clock.seconds_together(compute), clock.seconds_together(both)
    hidden = computing + communicating - together
    return min(1.0, max(0.0, hidden / min(computing, communicating)))


HEADER = "Written by tools/calibrate_device.py."


def raw_description(name_or_file: str) -> dict[str, Any]:
    """The content of a cluster's file that loads (`load_cluster`), with its device in it."""
    path = CLUSTERS / f"{name_or_file}.yaml"
    values = yaml.safe_load((path if path.exists() else Path(name_or_file)).read_text())
    if isinstance(values["device"], str):
        values["device"] = yaml.safe_load((DEVICES / f"{values['device']}.yaml").read_text())
    return values


def shares(rows: Rows, peak: float) -> list[list[float]]:
    """Of (size, seconds of a call), [size, share of the peak]; what is more than all of it, as of
    data that stays in a cache, is all of it."""
    return [[float(f"{n:.4g}"), rounded(min(1.0, n / seconds / peak))] for n, seconds in rows]


def attention_shares(calls: Calls, peak: float) -> list[list[float]]:
    """Return [FLOPs for each byte, share of the peak] of each call."""
    return [
        [rounded(flops / size), rounded(min(1.0, flops / seconds / peak))]
        for flops, size, seconds in calls
    ]


def best(rows: Rows) -> float:
    """The best rate of any call."""
    return rounded(max(n / seconds for n, seconds in rows))


def link_shares(
    seconds: Mapping[str, Rows],
    through: Mapping[str, tuple[float, int]],
    fixed: Mapping[str, float],
) -> tuple[float, dict[str, Any]]:
    """Bandwidth of the best call between ranks, and the shares of it by collective.

    seconds: of collectives, by bytes of the call. through: the bytes that go through a rank as a
    share of these. fixed: seconds of a call that are not the bytes'.
    """
    rates = {
        name: [
            (size, through[name][0] * size / max(taken - fixed[name], taken / 2))
            for size, taken in rows
        ]
        for name, rows in seconds.items()
    }
    peak = rounded(max(rate for rows in rates.values() for _, rate in rows))
    table = {
        name: [[float(size), rounded(min(1.0, rate / peak))] for size, rate in rows]
        for name, rows in rates.items()
    }
    if "send" in table:
        table["receive"] = [list(row) for row in table["send"]]
    slowest = min(table.values(), key=lambda rows: rows[-1][1])
    return peak, {**table, "others": [list(row) for row in slowest]}


def rounded(value: float) -> float:
    """To three digits, which is more than is known."""
    return float(f"{value:.3g}")


def write(values: dict[str, Any], path: Path, says: Sequence[str]) -> None:
    """says: lines at the top about where its figures are from."""
    options = {"initial_indent": "# ", "subsequent_indent": "#   ", "break_long_words": False}
    wrap = textwrap.TextWrapper(98, break_on_hyphens=False, **options)
    comment = [line for said in (HEADER, *says) for line in wrap.wrap(said)]
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(comment) + "\n" + text)


def measured_device(
    clock: Clock, values: dict[str, Any], is_all: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """A device's section: these values, but for what is measured. is_all: peaks, too."""
    tables, peaks = {}, dict(values["peak_flops"])
    for name in DTYPES[clock.device.type]:
        if not is_all and name not in peaks:  # a share of what
            continue
        say(f"products and attention in {name}")
        dtype = getattr(torch, name)
        squares = products(clock, dtype)
        forward, backward = attention(clock, dtype)
        if is_all:
            peaks[name] = best(
                [*squares, *((flops, taken) for flops, _, taken in forward + backward)]
            )
        tables[name] = {
            "product": shares(squares, peaks[name]),
            "attention_forward": attention_shares(forward, peaks[name]),
            "attention_backward": attention_shares(backward, peaks[name]),
        }
    say("memory and calls")
    rows = memory(clock)
    bandwidth = best(rows) if is_all else values["memory_bandwidth"]
    attainable: dict[str, Any] = {
        kind: {name: found[kind] for name, found in tables.items()}
        for kind in ("product", "attention_forward", "attention_backward")
    }
    attainable["memory_bandwidth"] = shares(rows, bandwidth)
    call, kernel = call_seconds(clock), 0.0
    if clock.device.type == "cuda":
        kernel = kernel_seconds(clock)
    else:  # the host is the device
        call, kernel = 0.0, call
    return {
        **values,
        "peak_flops": {name: peaks[name] for name in tables},
        "memory_bandwidth": bandwidth,
        "attainable": attainable,
        "kernel_seconds": rounded(kernel),
        "launch_seconds": rounded(call),
    }


def measured_links(clock: Clock) -> tuple[float, float, dict[str, Any]]:
    """The share that computation hides, what every collective takes, and a link's section."""
    through = {name: of(clock.ranks) for name, of in THROUGH.items()}
    small = SMALL * clock.ranks
    of_small = {name: call_of_all(clock, name, small) for name in through}
    latency = of_small["send"]
    call = statistics.median(
        max(0.0, took - through[name][1] * latency) for name, took in of_small.items()
    )
    fixed = {name: call + steps * latency for name, (_, steps) in through.items()}
    sizes = SIZES[clock.device.type]
    taken = {name: [(size, call_of_all(clock, name, size)) for size in sizes] for name in through}
    bandwidth, attainable = link_shares(taken, through, fixed)
    link = {"bandwidth": bandwidth, "attainable": attainable, "latency": rounded(latency)}
    return rounded(overlap(clock)), rounded(call), link
