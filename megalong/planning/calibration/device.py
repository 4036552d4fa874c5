"""The attainable rates of a device, by size of a call, and what a call takes beside them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from megalong.attention import operators
from megalong.attention.pattern import DilatedPattern
from megalong.planning.calibration.clock import Clock
from megalong.torch_private import TorchDispatchMode

# (size of the call, seconds of it)
Rows = list[tuple[float, float]]

PRODUCTS = {"cpu": (64, 128, 256, 512, 1024), "cuda": (512, 1024, 2048, 4096, 8192)}
LENGTHS = {"cpu": (128, 512, 1024, 2048, 4096), "cuda": (512, 2048, 8192, 16384)}
HEADS = {"cpu": 2, "cuda": 16}
MEMORY = {"cpu": (2**14, 2**17, 2**20, 2**23, 2**25), "cuda": (2**20, 2**24, 2**28)}  # numbers


def products(clock: Clock, dtype: torch.dtype) -> Rows:
    """Square products: FLOPs, seconds."""
    rows = []
    for n in PRODUCTS[clock.device.type]:
        a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
        rows.append((2.0 * n**3, clock.seconds(lambda a=a, b=b: a @ b)))
    return rows


def attention(clock: Clock, dtype: torch.dtype) -> tuple[Rows, Rows]:
    """Causal attention of one segment, head_dim 64, by the backend that training takes: FLOPs and
    seconds of the forward pass, and of the backward pass."""
    kind, forward, backward = clock.device.type, [], []
    options = {"causal": True, "scale": 0.125, "backend": "auto"}
    for n in LENGTHS[kind]:
        q, k, v, grad = (
            torch.randn(1, n, HEADS[kind], 64, device=clock.device).to(dtype) for _ in range(4)
        )
        pattern = DilatedPattern((n,), (1,))
        flops = 4.0 * 64 * HEADS[kind] * n * (n + 1) / 2
        out, lse = operators.forward(q, k, v, pattern, **options)
        forward.append(
            (flops, clock.seconds(lambda: operators.forward(q, k, v, pattern, **options)))  # noqa: B023
        )
        backward.append(
            (
                2.5 * flops,
                clock.seconds(
                    lambda: operators.backward(grad, q, k, v, out, lse, pattern, **options)  # noqa: B023
                ),
            )
        )
    return forward, backward


def memory(clock: Clock) -> Rows:
    """Sums of two float32 tensors into a new one: bytes read and written, seconds."""
    rows = []
    for n in MEMORY[clock.device.type]:
        a, b = (torch.ones(n, device=clock.device) for _ in range(2))
        rows.append((12.0 * n, clock.seconds(lambda a=a, b=b: a + b)))
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


def call_seconds(clock: Clock) -> float:
    """What calling an operator takes, with PyTorch's modules and autograd around it: of the passes
    of a small layer whose tensors are tiny, for each of its operators that is not a view."""
    layer = _Layer().to(clock.device)
    x = torch.ones(1, 8, 16, device=clock.device, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    with _CountCalls() as counting:
        step()
    calls = counting.calls
    repeats = max(20, round(clock.budget / 0.002))
    best = min(_host_seconds(step, clock, repeats) for _ in range(3))
    return clock.slowest(best / repeats / calls)


def _host_seconds(step: Callable[[], None], clock: Clock, repeats: int) -> float:
    """Until the host has made the calls, whether the device is done or not: what its thread works
    for it, and on a GPU what it waits."""
    now = time.perf_counter if clock.device.type == "cuda" else time.thread_time
    clock.wait()
    start = now()
    for _ in range(repeats):
        step()
    seconds = now() - start
    clock.wait()
    return seconds


class _Layer(nn.Module):
    """What layers are made of."""

    def __init__(self):
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.out(nn.functional.gelu(self.into(self.norm(x))))


class _CountCalls(TorchDispatchMode):
    """Counts operators that do work: those that give no view."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += not operator.is_view
        return operator(*args, **(kwargs or {}))
