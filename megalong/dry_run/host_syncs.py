"""Where the host waits for the device: what keeps a GPU idle, and what no test on a CPU shows.

On a GPU the host runs ahead and queues work. Whatever needs a value of the device back on the host
(`.item()`, `if tensor:`, `.cpu()`, an index of booleans) stops it until all that was queued is
done, and so does a copy between the two that is not `non_blocking`, or goes to memory of the host
that is not pinned. PyTorch can say so on a GPU (`torch.cuda.set_sync_debug_mode`); on fake tensors
it can be seen without one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megalong.dry_run import fake_device
from megalong.dry_run.fake_tensors import is_pinned, zero
from megalong.utils.machine import use_gpu
from megalong.utils.torch_private import (
    READ_VALUE,
    TO_COPY,
    DataDependentOutputException,
    DynamicOutputShapeException,
    TorchDispatchMode,
    tree_leaves,
)

aten = torch.ops.aten


class HostSync(RuntimeError):
    """The host would wait for the device."""


class WrongDevice(RuntimeError):
    """A tensor is not where those who use it need it to be."""


@dataclass(frozen=True)
class Wait:
    """A wait that is known and allowed.

    where: the function that waits: the end of its file's path, a colon, its name.
    why: what it needs to know. What it is told is zero.
    """

    where: str
    why: str

    def covers(self, frame: Any) -> bool:
        """Whether this is the function of a frame."""
        path, _, name = self.where.partition(":")
        return frame.f_code.co_name == name and frame.f_code.co_filename.endswith(path)


class HostSyncs(TorchDispatchMode):
    """Raises HostSync at the first wait that is not allowed, and WrongDevice where a collective
    gets a tensor of the host; inside a FakeTensorMode, which itself raises where devices are mixed.

    allowed: None is everything, as where tables are made that all later steps use.
    counts: how often the host waited, by `Wait.where`.
    """

    def __init__(self, allowed: Iterable[Wait] | None = ()):
        super().__init__()
        self.allowed = None if allowed is None else tuple(allowed)
        self.counts: Counter[str] = Counter()
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> HostSyncs:
        waiters = [(torch.cuda, "torch.cuda.synchronize"), (fake_device.Stream, "a stream")]
        for owner, what in (*waiters, (fake_device.Event, "an event")):

            def synchronize(*_: Any, what: str = what, **__: Any) -> None:
                self._wait(f"the host waits for {what}")

            self._patches.enter_context(mock.patch.object(owner, "synchronize", synchronize))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is READ_VALUE and args[0].device.type == "cuda":
            self._wait("the host reads a value (as .item() does)")
            return zero(args[0].dtype)
        if operator.namespace == "c10d" and use_gpu():
            _check_collective(operator, args)
        elif operator in (TO_COPY, aten.copy_.default):
            self._check_copy(operator, args, kwargs)
        elif operator in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            indices = [x for x in args[1] if x is not None]
            if args[0].device.type == "cuda" and any(x.device.type == "cpu" for x in indices):
                self._wait("an index on the host is copied to the device")
        try:
            return operator(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise HostSync(f"the host has to know what {operator} finds{_at(_caller())}") from error

    def _check_copy(self, operator: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if operator is TO_COPY:
            [source], target = args, torch.device(kwargs.get("device") or args[0].device)
            non_blocking, pinned = kwargs.get("non_blocking", False), True  # if it is to the host
        else:
            target, source = args[0].device, args[1]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            pinned = is_pinned(args[0])
        if {source.device.type, target.type} != {"cpu", "cuda"}:
            return
        to = "to the device" if target.type == "cuda" else "to the host"
        if not non_blocking:
            self._wait(f"a copy {to} of {tuple(source.shape)} is not non_blocking")
        elif target.type == "cpu" and not pinned:
            self._wait(f"a copy {to} of {tuple(source.shape)} goes to memory that is not pinned")

    def _wait(self, what: str) -> None:
        if self.allowed is None:
            return
        caller = _caller()
        for wait in self.allowed:
            if wait.covers(caller):
                self.counts[wait.where] += 1
                return
        raise HostSync(what + _at(caller))


def _caller() -> Any:
    """The frame that asked for it: the innermost outside of PyTorch, of other dispatch modes and of
    this file."""
    frame = inspect.currentframe()
    while frame.f_back is not None:
        code = frame.f_code
        between = code.co_filename == __file__ or code.co_name == "__torch_dispatch__"
        if not between and not code.co_filename.startswith(torch.__path__[0]):
            break
        frame = frame.f_back
    return frame


def _at(frame: Any) -> str:
    return f", in {frame.f_code.co_name} at {frame.f_code.co_filename}:{frame.f_lineno}"


def _check_collective(operator: Any, args: Any) -> None:
    for tensor in tree_leaves(args):
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
            raise WrongDevice(f"{operator} gets a tensor of the CPU, which NCCL cannot send")
