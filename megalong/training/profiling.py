"""A trace of a few iterations by torch.profiler, and on a GPU what its memory held meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile, record_function

from megalong.config import Config
from megalong.parallel.mesh import Mesh
from megalong.torch_private import record_memory_history, write_memory_history
from megalong.training.stopping import Stopped

MEMORY_EVENTS = 1_000_000  # allocations and releases that a snapshot remembers


class Profiler:
    """Profiles this rank's iterations from `--profile-step-start` on, up to that before
    `--profile-step-end`, where `--profile` and `--profile-ranks` want it. A context around the
    training: of one that is asked to stop, what was traced until then is kept.

    Writes into the run folder profile/rank0_iterations_10-11.json.gz, which Perfetto and
    chrome://tracing show, and on a GPU ..._memory.pickle for https://pytorch.org/memory_viz.
    say: called with a line to be said. pause: a context around what is no training.
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
        self._mesh, self._say, self._pause, self._save = mesh, say, pause, run.save
        self._under_way: profile | None = None
        self._iterations: list[int] = []

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, Stopped):
            self._finish()

    @contextlib.contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Around each iteration."""
        if not self._wanted or not self._first <= number < self._stop:
            yield
            return
        if self._under_way is None:
            with self._pause():
                self._begin()
        self._iterations.append(number)
        with record_function(f"iteration {number}"):
            yield
        if number == self._stop - 1:
            with self._pause():
                self._finish()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            record_memory_history(MEMORY_EVENTS)
        self._under_way = profile(activities=activities, record_shapes=True, with_stack=True)
        self._under_way.start()

    def _finish(self) -> None:
        profiler, self._under_way = self._under_way, None
        if profiler is None:
            return
        profiler.stop()
        first, last = self._iterations[0], self._iterations[-1]
        name = f"rank{self._mesh.rank}_iterations_{first}-{last}"
        folder = Path(self._save) / "profile"
        try:
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
            if self._mesh.device.type == "cuda":
                write_memory_history(str(folder / f"{name}_memory.pickle"))
        except OSError as error:  # no reason to end a training
            self._say(f"--profile: no trace of iterations {first} to {last}: {error}")
        else:
            self._say(f"traced iterations {first} to {last}: {folder / name}.json.gz")
