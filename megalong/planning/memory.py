"""The memory that a run on fake tensors would hold at its peak: of the device, and of what kind,
and pinned memory of the host."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megalong.device import use_gpu
from megalong.planning.fake_tensors import is_pinned
from megalong.torch_private import TorchDispatchMode, is_going_backward, tree_leaves

BLOCK = 512  # bytes: PyTorch's allocator rounds up to multiples of that


class DeviceMemory(TorchDispatchMode):
    """Follows every storage on the device, and in pinned memory, from the operator that makes it to
    its end.

    What a storage is for is told by when it is made: `during` names the phase, and within one that
    is called "forward", what autograd makes while it goes backward is "backward".
    Not in it: the allocator's fragmentation, CUDA's context, what kernels and NCCL hold.

    now, peak: bytes of the device by kind. host_now, host_peak: bytes of pinned memory, which
    PyTorch rounds up to a power of two; their peak may come at another time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.host_now = self.host_peak = 0
        self._phase, self._device = "other", "cuda" if use_gpu() else "cpu"
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Inside, what is made is of this kind."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.device.type == self._device:
                self._follow(tensor.untyped_storage())
            elif is_pinned(tensor):
                self._follow_on_host(tensor.untyped_storage())
        return result

    def are(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say of what kind these are, whenever they were made."""
        for tensor in tensors:
            entry = self._seen.get(tensor.untyped_storage())
            if entry is not None:
                self.now[entry.kind] -= entry.size
                self.now[kind] += entry.size
                entry.kind = kind

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        kind = self._phase
        if kind == "forward" and is_going_backward():
            kind = "backward"
        entry = self._seen[storage] = _Entry(kind, -(-storage.nbytes() // BLOCK) * BLOCK)
        self.now[kind] += entry.size
        weakref.finalize(storage, self._forget, entry)
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def _forget(self, entry: _Entry) -> None:
        self.now[entry.kind] -= entry.size

    def _follow_on_host(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = 1 << max(0, storage.nbytes() - 1).bit_length()
        self._seen[storage] = _Entry("host", size)
        self.host_now += size
        self.host_peak = max(self.host_peak, self.host_now)
        weakref.finalize(storage, self._forget_on_host, size)

    def _forget_on_host(self, size: int) -> None:
        self.host_now -= size


@dataclass
class _Entry:
    kind: str
    size: int  # bytes
