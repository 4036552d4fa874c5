"""What the steps since the last log took: seconds, waiting for data, saves, and memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch

from megalong.data.batches import Batch


class Meter:
    """Measures the training on this rank; `take` gives what was measured since the last time.

    The clock runs all the time but in `pause`: a step's seconds are those between two steps, so
    that they hold whatever a GPU computes while the host is ahead of it.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._save: tuple[float, float] | None = None  # begin, and seconds of standstill
        self.restart()

    def restart(self) -> None:
        """Forget what was measured so far."""
        self._steps, self._waited, self._paused = 0, 0.0, 0.0
        self._start = time.perf_counter()

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; until one is there, the training waits for data."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - start
            yield batch

    def step(self) -> None:
        """One step is done."""
        self._steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is no training: a save, an evaluation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a checkpoint is saved, or copied to be written in the background."""
        begin = time.perf_counter()
        with self.pause():
            yield
        self._save = begin, time.perf_counter() - begin

    def take_save(self, durable_at: float | None) -> dict[str, float]:
        """The times of the last save, once: nothing before it is on the disk, nor afterwards.

        durable_at: `time.perf_counter()` when the last checkpoint was on the disk.
        """
        if self._save is None or durable_at is None or durable_at < self._save[0]:
            return {}
        (begin, blocking), self._save = self._save, None
        return {"save_seconds": durable_at - begin, "save_blocking_seconds": blocking}

    def take(self) -> tuple[float, float]:
        """Seconds of a step, mean over those since the last call, and the share of them that was
        spent waiting for data."""
        seconds = time.perf_counter() - self._start - self._paused
        result = seconds / self._steps, self._waited / seconds
        self.restart()
        return result

    def take_memory(self) -> dict[str, Any]:
        """The peak of this process's memory, in bytes: on a GPU, since the last call, what its
        tensors took (peak_memory_bytes) and what PyTorch had reserved for them; on a CPU, since
        the start, the resident set."""
        if self._device.type == "cuda":
            peaks = {
                "peak_memory_bytes": torch.cuda.max_memory_allocated(self._device),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(self._device),
            }
            torch.cuda.reset_peak_memory_stats(self._device)
            return peaks
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": resident * 1024}  # Linux counts in KiB
