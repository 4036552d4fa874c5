"""Timing of calls that all ranks of a launch make at the same time, as they do in training: they
share caches, memory and power."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

FEWEST, MOST = 5, 200  # calls


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
        """The median of repeated calls, on the slowest rank. Every rank makes as many."""
        call()
        once = self.slowest(self._once(call, 1))
        calls = max(FEWEST, min(MOST, round(self.budget / max(once, 1e-9))))
        if self.device.type == "cuda":  # the host runs ahead: the device has no gaps
            return self.slowest(min(self._once(call, calls) for _ in range(3)) / calls)
        return self.slowest(statistics.median(self._once(call, 1) for _ in range(calls)))

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

    def together(self) -> None:
        """Until all ranks are here."""
        self.wait()
        self.slowest(0.0)

    def _once(self, call: Callable[[], object], calls: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        self.wait()
        return time.perf_counter() - start
