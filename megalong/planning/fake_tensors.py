"""The host is real, the device is fake: what lives on the CPU is computed, what lives on the GPU
has a shape, a dtype and a device, and no data; and so has what is large in pinned memory."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch

from megalong.torch_private import (
    EFFICIENT_ATTENTION,
    FLASH_ATTENTION,
    FakeTensor,
    FakeTensorMode,
    tree_leaves,
)

LARGE = 2**20  # bytes of pinned memory from which on it is fake: no table is that large


class FakeDeviceMode(FakeTensorMode):
    """Makes tensors of device "cuda", and what is computed with them, fake; others stay real.

    So tables, plans and random states on the host have values, which their code may look at. Pinned
    memory that is large has none: a run may need more of it than this machine has.

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
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type == "cuda" or any(isinstance(x, FakeTensor) for x in tensors):
            return super().__torch_dispatch__(operator, types, args, kwargs)
        return operator(*args, **kwargs)

    def _pinned(self, operator, types, args, kwargs) -> torch.Tensor:
        tensor = super().__torch_dispatch__(operator, types, args, kwargs)
        if tensor.nbytes < LARGE:
            tensor = operator(*args, **kwargs)
        self.pinned.add(tensor.untyped_storage())
        return tensor


@cache
def _mode() -> FakeDeviceMode:
    """One for the process: tables that are kept for later calls belong to it."""
    return FakeDeviceMode()


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a tensor was made in pinned memory, inside `fake_device_tensors`."""
    return tensor.untyped_storage() in _mode().pinned


@contextlib.contextmanager
def fake_device_tensors() -> Iterator[FakeDeviceMode]:
    """Inside, tensors of device "cuda" are fake, and modules of them may change their dtype."""
    with (
        _mode() as mode,
        mock.patch.object(torch.nn.Module, "_apply", _apply),
        mock.patch.object(torch.Tensor, "record_stream", lambda *_: None),  # wants a real stream
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _dense_attention),
    ):
        yield mode


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
