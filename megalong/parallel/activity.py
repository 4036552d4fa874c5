"""What a rank is doing, seen from beside its main thread, and which rank the others wait for.

A rank that hangs cannot say so: its process may stand still as a whole. So every rank looks at
itself now and then and tells what it sees; the one that falls silent, or that stands still outside
of a collective while others stand in one, is what keeps the job from going on.
"""

from __future__ import annotations

import dataclasses
import json
import linecache
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

import torch

from megalong.utils.torch_private import collective_counts, open_collectives

# Where a thread of a rank may stand as long as it likes: what is written to slow disks and to
# services, and compilers.
PATIENT = (
    "/megalong/checkpoint/", "/megalong/training/metrics.py", "/megalong/training/profiling.py",
    "/deepspeed/ops/op_builder/", "/torch/_dynamo/convert_frame.py",
    "/torch/_inductor/async_compile.py", "/torch/_inductor/compile_fx.py",
    "/torch/utils/cpp_extension.py", "/triton/backends/", "/triton/compiler/",
)  # fmt: skip
COMPUTING = 0.05  # seconds of a CPU in a second, above which a rank that trains on it computes
PACKAGE = str(Path(__file__).resolve().parent.parent)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    still: seconds since it last moved. waits_in: the collective in which it waits, "" where in
    none. place: where in the program its main thread is. patient: whether a thread is where it may
    stay.
    """

    still: float
    waits_in: str = ""
    place: str = ""
    patient: bool = False

    def to_line(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def from_line(cls, line: str) -> Report:
        return cls(*json.loads(line))


class Activity:
    """Looks at this process.

    It has moved if a thread is at another place of the program than the last time (on a GPU
    autograd goes backward in threads of its own), or if collectives began or ended; or if it
    computes, where it does so on the CPU (a rank that waits for a GPU takes a whole core); or if it
    allocates memory of a GPU.

    axis_of_group: names of process groups -> those of their axes. interval: seconds from one look
    to the next. After a pause of some of them the process itself was stopped, or its machine, and
    the time begins anew. device: on which it trains.
    """

    def __init__(self, axis_of_group: Mapping[str, str], interval: float, device: torch.device):
        self._axis_of_group, self._interval = axis_of_group, interval
        self._main: int = threading.main_thread().ident
        self._device = device
        self._mark: object = None
        self._moved = self._looked = time.monotonic()
        self._computed, self._allocations = 0.0, 0

    def look(self) -> Report:
        """What this process is doing now."""
        now, computed = time.monotonic(), self._seconds_computed()
        frames = sys._current_frames()
        stack = list(_stack(frames.pop(self._main, None)))
        frames.pop(threading.get_ident(), None)
        stacks = [stack, *(list(_stack(frame)) for _, frame in sorted(frames.items()))]
        places = [[(frame.f_code, frame.f_lasti) for frame in each] for each in stacks]
        mark = places, collective_counts()
        files = {frame.f_code.co_filename for each in stacks for frame in each}
        passed = now - self._looked
        computes = self._device.type == "cpu" and computed - self._computed > COMPUTING * passed
        if mark != self._mark or computes or passed > pause(self._interval):
            self._moved = now
        self._mark, self._looked, self._computed = mark, now, computed
        still = now - self._moved
        waits_in = self._collective(stack) if still > self._interval else ""
        # The allocator may answer only after the GPU: not to be asked where that waits for a rank.
        if still > self._interval and not waits_in and self._has_allocated():
            self._moved, still = now, 0.0
        return Report(
            still=still,
            waits_in=waits_in,
            place=_place(stack),
            patient=any(part in file for file in files for part in PATIENT),
        )

    def _seconds_computed(self) -> float:
        """CPU time of the main thread: those of gloo use some for ever."""
        if not hasattr(time, "pthread_getcpuclockid"):  # macOS
            return time.process_time()
        return time.clock_gettime(time.pthread_getcpuclockid(self._main))

    def _has_allocated(self) -> bool:
        """Whether memory of the GPU was allocated since this was asked the last time."""
        if self._device.type != "cuda":
            return False
        before = self._allocations
        stats = torch.cuda.memory_stats(self._device)
        self._allocations = stats.get("allocation.all.allocated", before)
        return self._allocations != before

    def _collective(self, stack: list[FrameType]) -> str:
        for name, group in open_collectives():
            axis = self._axis_of_group.get(group)
            return f"{name} of the {axis} axis" if axis else name
        # gloo keeps no record of what is sent from one rank to another.
        if not stack:
            return ""
        code = stack[0].f_code
        if "/torch/distributed/" in code.co_filename:
            return code.co_name
        line = linecache.getline(code.co_filename, stack[0].f_lineno)
        return "a receive" if ".wait(" in line and "/megatron/" in code.co_filename else ""


def pause(interval: float) -> float:
    """Seconds between two looks after which something has held this process up."""
    return 3 * interval


def find_hung(seen: Mapping[str, tuple[float, Report]], limit: float) -> str | None:
    """Who hangs, in words, or None while the job goes on, or may.

    seen: names of ranks -> seconds since their last report, and what that was. limit: seconds for
    which no rank may have moved. A rank hangs that was silent for as long; or else one that stands
    still outside of any collective while another waits in one.
    """
    if any(age < limit and report.still < limit for age, report in seen.values()):
        return None
    silent = {name: age for name, (age, _) in seen.items() if age >= limit}
    waiting = {name: r for name, (_, r) in seen.items() if r.waits_in and name not in silent}
    stuck = {
        name: report.still
        for name, (_, report) in seen.items()
        if not (name in silent or name in waiting or report.patient)
    }
    hung = silent or (stuck if waiting else {})
    if not hung:
        return None
    words = []
    for name, seconds in list(hung.items())[:4]:
        what = "gives no sign of life" if silent else "does not move"
        words.append(f"{name} {what} since {_clock(seconds)}, for {seconds:.0f} s")
        if place := seen[name][1].place:
            words[-1] += f", {'last seen ' if silent else ''}at {place}"
    if len(hung) > 4:
        words.append(f"nor do {len(hung) - 4} others")
    for name, report in list(waiting.items())[:1]:
        waits = f"{report.waits_in} since {_clock(report.still)}, at {report.place}"
        words.append(f"{name} waits in {waits}")
    return "; ".join(words)


def _clock(seconds_ago: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() - seconds_ago))


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    """From the innermost frame outwards."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(stack: list[FrameType]) -> str:
    """The innermost line that is not PyTorch's own, and the line of ours that led there."""
    outside = [frame for frame in stack if not _is_pytorchs(frame)]
    ours = [frame for frame in outside if frame.f_code.co_filename.startswith(PACKAGE)]
    return ", from ".join(dict.fromkeys(_line(frame) for frame in (*outside[:1], *ours[:1])))


def _is_pytorchs(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in ("/torch/", "/typing_extensions.py"))


def _line(frame: FrameType) -> str:
    code = frame.f_code
    path = "/".join(Path(code.co_filename).parts[-3:])
    return f"{path}:{frame.f_lineno} ({code.co_name})"
