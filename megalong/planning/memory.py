"""The device memory that a run on fake tensors would hold at its peak, and of what kind."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megalong.torch_private import TorchDispatchMode, is_going_backward, tree_leaves

BLOCK = 512  # bytes: PyTorch's allocator rounds up to multiples of that


class DeviceMemory(TorchDispatchMode):
    """Follows every storage on the device from the operator that makes it to its end.

    What a storage is for is told by when it is made: `during` names the phase, and within one that
    is called "forward", what autograd makes while it goes backward is "backward".
    Not in it: the allocator's fragmentation, CUDA's context, what kernels and NCCL hold.

    now, peak: bytes by kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._phase = "other"
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
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._follow(tensor.untyped_storage())
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


@dataclass
class _Entry:
    kind: str
    size: int  # bytes
