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
        """Of a call that waits for nobody, on the slowest rank: the median of repeated ones. Every
        rank makes as many.

        On a CPU it is the time that the core worked for it, so that others, who may be using the
        machine as well, do not count; a call has to be single-threaded.
        """
        call()
        calls = self._calls(self._once(call, 1))
        if self.device.type == "cuda":  # the host runs ahead: the device has no gaps
            return self.slowest(min(self._once(call, calls) for _ in range(3)) / calls)
        times = [self._once(call, 1, time.thread_time) for _ in range(calls)]
        return self.slowest(statistics.median(times))

    def seconds_together(self, call: Callable[[], object]) -> float:
        """Of a call in which ranks wait for each other, on the slowest rank: the shortest of
        repeated ones on a CPU, where others may be in the way."""
        call()
        calls = self._calls(self._once(call, 1))
        if self.device.type == "cuda":
            return self.slowest(min(self._once(call, calls) for _ in range(3)) / calls)
        return self.slowest(min(self._once(call, 1) for _ in range(calls)))

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
