"""The attainable rates of a device, by size of a call, and what a call takes beside them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import torch

from megalong.attention import operators
from megalong.attention.pattern import DilatedPattern
from megalong.dry_run.calibration.clock import Clock

# (size of the call, seconds of it)
Rows = list[tuple[float, float]]

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


@dataclass(frozen=True)
class Attention:
    """A timed call: its FLOPs, bytes read and written, and seconds."""

    flops: float
    bytes: float
    seconds: float


def attention(clock: Clock, dtype: torch.dtype) -> tuple[list[Attention], list[Attention]]:
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
        forward.append(Attention(flops, 4 * q.nbytes + lse.nbytes, clock.seconds(here)))
        backward.append(Attention(2.5 * flops, 8 * q.nbytes + lse.nbytes, clock.seconds(back)))
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
