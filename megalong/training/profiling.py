"""A trace of a few iterations by torch.profiler, and on a GPU what its memory held meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megalong.config import Config
from megalong.parallel.mesh import Mesh
from megalong.utils.torch_private import (
    forget_memory_history,
    record_memory_history,
    write_memory_history,
)

MEMORY_EVENTS = 1_000_000  # allocations and releases that a snapshot remembers


class Profiler:
    """Profiles this rank's iterations as the `--profile` flags want it. A context around the
    training: of one that ends early, out of memory say, what was traced until then is kept.

    Writes into the run folder profile/rank0_iterations_10-11.json.gz, which Perfetto and
    chrome://tracing show, and on a GPU ..._memory.pickle for https://pytorch.org/memory_viz.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        say: Callable[[str], None],
        pause: Callable[[], AbstractContextManager[None]],
    ):
        run = config.run
        self._wanted = run.profile and mesh.rank in run.profile_ranks
        self._first, self._stop = run.profile_step_start, run.profile_step_end
        self._last = config.training.train_iters
        self._mesh, self._say, self._pause, self._save = mesh, say, pause, run.save
        self._under_way: profile | None = None
        self._iterations: list[int] = []

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *error: Any) -> None:
        self._finish()

    @contextlib.contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Around each iteration."""
        if not self._wanted or not self._first <= number < self._stop:
            yield
            return
        self._iterations.append(number)
        if self._under_way is None:
            with self._pause():
                self._begin()
        with record_function(f"iteration {number}"):
            yield
        if number in (self._stop - 1, self._last):  # before the save and the evaluation after it
            with self._pause():
                self._finish()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)  # no kernels of the step before in the trace
            activities.append(ProfilerActivity.CUDA)
            record_memory_history(MEMORY_EVENTS)
        self._under_way = profile(activities=activities, record_shapes=True, with_stack=True)
        self._under_way.start()

    def _finish(self) -> None:
        profiler, self._under_way = self._under_way, None
        if profiler is None:
            return
        name = f"rank{self._mesh.rank}_iterations_{self._iterations[0]}-{self._iterations[-1]}"
        folder = Path(self._save) / "profile"
        with self._kept("trace"):
            profiler.stop()
            folder.mkdir(exist_ok=True)
            trace = folder / f"{name}.json.gz"
            profiler.export_chrome_trace(str(trace))
            self._say(f"traced {self._which}: {trace}")
        if self._mesh.device.type == "cuda":
            with self._kept("snapshot of memory"), contextlib.ExitStack() as at_end:
                at_end.callback(forget_memory_history)
                folder.mkdir(exist_ok=True)
                write_memory_history(str(folder / f"{name}_memory.pickle"))

    @contextlib.contextmanager
    def _kept(self, what: str) -> Iterator[None]:
        """Inside, it is written; where that fails, a line says so, for it is no reason to end a
        training, nor to hide what has ended it."""
        try:
            yield
        except Exception as error:
            self._say(f"--profile: no {what} of {self._which}: {error}")

    @property
    def _which(self) -> str:
        return f"iterations {self._iterations[0]} to {self._iterations[-1]}"
