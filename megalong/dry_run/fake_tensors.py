"""The host is real, the device is fake: what lives on the CPU is computed, what lives on the GPU
has a shape, a dtype and a device, and no data; and so has what is large in pinned memory, and what
is large and floating-point: an optimizer that lives on the host.

Where the CPU itself is what a launch trains on, its numbers are fake, and its tables real.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch

from megalong.attention.operators import IMPLEMENTATIONS
from megalong.dry_run import fake_device
from megalong.utils.machine import use_gpu
from megalong.utils.torch_private import (
    EFFICIENT_ATTENTION,
    FLASH_ATTENTION,
    READ_VALUE,
    TO_COPY,
    TO_PINNED,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    tree_leaves,
)


def forget_tables() -> None:
    """Have attention make the tables on the device anew that it keeps for later calls, so that what
    a run holds and does is not less for the runs that came before it in this process."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megalong.attention."):
            for function in list(vars(module).values()):
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


class InsideAttention(TorchDispatchMode):
    """Runs what attention's operators are made of, so that modes that are entered before see it.

    recorder: is told of each operator and of each launch (`megalong.dry_run.recorder`)."""

    def __init__(self, recorder: Any = None) -> None:
        super().__init__()
        self._recorder = recorder
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> InsideAttention:
        if find_spec("triton") is not None:
            from megalong.attention.triton import launch

            start = partial(self._launch, launch.launch)
            self._patches.enter_context(mock.patch.object(launch, "launch", start))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        ours = operator.namespace == "megalong" and name in IMPLEMENTATIONS
        if not ours or not self._opens(args[0]):
            return operator(*args, **(kwargs or {}))
        compute = IMPLEMENTATIONS[name]
        with _InParts():
            if self._recorder is None:
                return compute(*args, **(kwargs or {}))
            return self._recorder.attention(operator, args, kwargs or {}, compute)

    def _opens(self, tensor: torch.Tensor) -> bool:
        return True

    def _launch(self, start: Any, kernel: Any, programs: int, device: Any, *args: Any, **names):
        if programs and self._recorder is not None:
            self._recorder.launched(args)
        self._start(start, kernel, programs, device, *args, **names)

    def _start(self, start: Any, *launch: Any, **names: Any) -> None:
        start(*launch, **names)


class NoKernels(InsideAttention):
    """The same of fake tensors, without the kernels. To be entered inside a FakeTensorMode."""

    def _opens(self, tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor)

    def _start(self, *_: Any, **__: Any) -> None:
        """There is nothing to compute with."""


class _InParts(TorchDispatchMode):
    """Takes composite operators (`.to` is one) apart, as autograd does above the modes: they know
    the parts."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs, result = kwargs or {}, NotImplemented
        if operator.namespace == "aten":
            with self:
                result = operator.decompose(*args, **kwargs)
        return operator(*args, **kwargs) if result is NotImplemented else result


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


LARGE = 2**20  # bytes of the host from which on it is fake: no table of that kind is that large
RANGES = (torch.ops.aten.arange, torch.ops.aten.linspace)  # what tables are made of


class FakeDeviceMode(FakeTensorMode):
    """Makes tensors of device "cuda", and what is computed with them, fake; others stay real.

    So tables, plans and random states on the host have values, which their code may look at. Pinned
    memory that is large has none, nor have large floating-point tensors that are made there: a run
    may need more of both than this machine has.

    pinned: the storages that are in pinned memory.
    """

    avoid_device_init = True  # there is none to initialise, whatever torch.cuda says

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            return self._pinned(operator, types, args, {**kwargs, "pin_memory": False})
        if operator is TO_PINNED:
            return self._pinned_copy(args[0], types)
        if operator is torch.ops.aten.is_pinned.default:
            return args[0].untyped_storage() in self.pinned
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cuda" or any(isinstance(x, FakeTensor) for x in tensors):
            result = super().__torch_dispatch__(operator, types, args, kwargs)
            if operator is TO_COPY and not isinstance(result, FakeTensor):  # on the host
                return result if result.nbytes < LARGE else self._fake_like(result, types)
            return result
        on_host = device.type == "cpu" and not tensors
        if on_host and _makes_large_numbers(operator, args, kwargs):
            return super().__torch_dispatch__(operator, types, args, kwargs)
        return _empty_as_zero(operator, operator(*args, **kwargs))

    def _pinned(self, operator, types, args, kwargs) -> torch.Tensor:
        tensor = super().__torch_dispatch__(operator, types, args, kwargs)
        if tensor.nbytes < LARGE:
            tensor = _empty_as_zero(operator, operator(*args, **kwargs))
        self.pinned.add(tensor.untyped_storage())
        return tensor

    def _pinned_copy(self, tensor: torch.Tensor, types: Any) -> torch.Tensor:
        if isinstance(tensor, FakeTensor) or tensor.nbytes >= LARGE:
            copy = self._fake_like(tensor, types)
        else:
            copy = tensor.clone()
        self.pinned.add(copy.untyped_storage())
        return copy

    def _fake_like(self, tensor: torch.Tensor, types: Any) -> torch.Tensor:
        return super().__torch_dispatch__(torch.ops.aten.empty_like.default, types, (tensor,))


def _makes_large_numbers(operator: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call makes a large floating-point tensor of a shape that it is given."""
    if operator.namespace != "aten" or not args or not isinstance(args[0], list | tuple):
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return dtype.is_floating_point and math.prod(args[0]) * dtype.itemsize >= LARGE


class FakeCpuMode(FakeTensorMode):
    """Makes the numbers of a launch on the CPU fake: parameters, buffers of floating-point numbers,
    and what is computed with them. Integers and ranges are real: they are tables and indices, which
    their code may look at. A number that the code asks for is zero.

    pinned: the storages that are in pinned memory, which a CPU has none of.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, FakeTensor) for x in tensors):
            if operator is READ_VALUE:
                return zero(args[0].dtype)
            return super().__torch_dispatch__(operator, types, args, kwargs)
        device = kwargs.get("device")
        of_shapes = device is not None and all(x.is_meta for x in tensors)
        made = (not tensors or of_shapes) and operator.namespace == "aten"
        elsewhere = torch.device(device or "cpu").type != "cpu"
        if not made or elsewhere or operator.overloadpacket in RANGES:
            return operator(*args, **kwargs)
        result = super().__torch_dispatch__(operator, types, args, kwargs)
        numbers = isinstance(result, torch.Tensor) and result.is_floating_point()
        if tensors or (numbers and result.dim()):
            return result
        return _empty_as_zero(operator, operator(*args, **kwargs))


def _empty_as_zero(operator: Any, result: Any) -> Any:
    """What a fake tensor would have been copied to is read as zero, as that is itself, and not as
    what memory happens to hold."""
    made = operator.namespace == "aten" and "empty" in operator.overloadpacket.__name__
    return result.zero_() if made else result


def zero(dtype: torch.dtype) -> bool | int | float:
    """What is read of a tensor that has no values."""
    if dtype == torch.bool:
        return False
    return 0.0 if dtype.is_floating_point else 0


@cache
def _mode() -> FakeDeviceMode | FakeCpuMode:
    """One for the process: tables that are kept for later calls belong to it."""
    return FakeDeviceMode() if use_gpu() else FakeCpuMode()


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made in pinned memory, inside `fake_device_tensors`."""
    return tensor.untyped_storage() in _mode().pinned


@contextlib.contextmanager
def fake_device_tensors() -> Iterator[None]:
    """Inside, tensors of the device that a launch would train on (`use_gpu`) are fake, and modules
    of them may change their dtype."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_mode())
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        if use_gpu():
            functional = torch.nn.functional
            for owner, name, substitute in (
                (torch.Tensor, "record_stream", lambda *_: None),  # wants a real stream
                (functional, "scaled_dot_product_attention", _dense_attention),
            ):
                stack.enter_context(mock.patch.object(owner, name, substitute))
        yield


def _dense_attention(q, k, v, *, is_causal=False, scale=None, enable_gqa=False):
    """As PyTorch's `scaled_dot_product_attention` on a GPU: what it runs there it asks the device,
    and would otherwise hold all scores."""
    if q.dtype.itemsize == 2:
        return FLASH_ATTENTION(q, k, v, 0.0, is_causal, scale=scale)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return EFFICIENT_ATTENTION(q, k, v, None, True, 0.0, is_causal, scale=scale)[0]


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """`torch.nn.Module._apply` (what `.to` and `.bfloat16` are made of), which gives up on fake
    parameters: they stay the same objects, as real ones do."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    for parameter in module.parameters(recurse=False):
        with torch.no_grad():
            new = function(parameter)
        if new is not parameter:
            parameter.data = new
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, function(buffer))
    return module
