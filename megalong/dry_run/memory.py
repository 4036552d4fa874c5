"""The memory that a run on fake tensors would hold at its peak: of the device, and of what kind,
and of the host."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from megalong.dry_run.fake_tensors import is_pinned
from megalong.utils.machine import use_gpu
from megalong.utils.torch_private import (
    FakeTensor,
    TorchDispatchMode,
    is_going_backward,
    tree_leaves,
)

BLOCK = 512  # bytes: PyTorch's allocator rounds up to multiples of that


def whole_blocks(nbytes: int) -> int:
    """What so many bytes take of the device's memory."""
    return -(-nbytes // BLOCK) * BLOCK


class DeviceMemory(TorchDispatchMode):
    """Follows every storage on the device, and of the host what is pinned, or with `unpinned` fake
    at all (an optimizer that lives there), from the operator that makes it to its end.

    What a storage is for (`megalong.dry_run.work.MEMORY`) is what somebody says (`during`, `are`),
    or else follows from its life:
    - activations: made in a forward pass, and kept for a backward pass;
    - gradients: made in a backward pass, and kept for the update;
    - collectives: buffers of collectives that are neither, and all those of the data axis (buckets
      of gradients, weights that ZeRO 3 gathers);
    - tables: made in a step, and kept for the next one: index tables, rotary angles;
    - temporaries: everything else, with what is recomputed in the backward pass.
    A training loop says when the update begins (`begin_update`) and ends (`end_update`).
    Not in it: the allocator's fragmentation, CUDA's context, what kernels and NCCL hold.

    host_now, host_peak: bytes of the host, which PyTorch rounds up to a power of two where they are
    pinned; their peak may come at another time.
    """

    def __init__(self, unpinned: bool = False) -> None:
        super().__init__()
        self._unpinned = unpinned
        self.host_now = self.host_peak = 0
        self._device = "cuda" if use_gpu() else "cpu"
        self._kind: str | None = None
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._log: list[Change] = []
        self._backward = False  # what the last operator was
        self._updating = False
        self._passes = self._updates = 0  # backward passes, and updates, that have begun

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Inside, what is made is of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def are(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Say of what kind these are, whenever they were made."""
        for tensor in tensors:
            block = self._seen.get(tensor.untyped_storage())
            if block is not None:
                block.kind = kind

    def carry(self, tensors: Iterable[torch.Tensor], axis: str) -> None:
        """Say that a collective over an axis of the mesh reads or writes these."""
        for tensor in tensors:
            block = self._seen.get(tensor.untyped_storage())
            if block is not None:
                block.axes |= {axis}

    def begin_steps(self) -> None:
        """The engine is built: of the host, what steps hold counts from now on. DeepSpeed lays out
        weights there before."""
        self.host_peak = self.host_now

    def begin_update(self) -> None:
        """All backward passes of a step are over."""
        self._updating = True
        self._updates += 1

    def end_update(self) -> None:
        """The next step may begin."""
        self._updating = False

    @property
    def now(self) -> int:
        """Bytes of the device that are held."""
        return sum(size for _, size in self._log)

    @property
    def moment(self) -> int:
        """A number for now, which grows."""
        return len(self._log)

    def repeat(self, start: int, stop: int, times: int) -> None:
        """Say that what was between two moments happens so many times in succession: what was made
        there and is still held is held as often, from the second moment on."""
        made = [c for c in self._log[start:stop] if c.size > 0 and c.block.end is None]
        for block, size in made:
            block.others += size * (times - 1)
        self._log[stop:stop] = [c._replace(size=c.size * (times - 1)) for c in made]

    @property
    def peak(self) -> Counter[str]:
        """Bytes of the device by kind, at the time when they are most in total."""
        now = most = 0
        position = -1
        for number, (_, size) in enumerate(self._log):
            now += size
            if now > most:
                most, position = now, number
        by_kind: Counter[str] = Counter()
        for block, size in self._log[: position + 1]:
            by_kind[self._kind_of(block)] += size
        return Counter({kind: size for kind, size in by_kind.items() if size})

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if is_going_backward() != self._backward:
            self._backward = not self._backward
            self._passes += self._backward
        self._look(result)
        return result

    def _look(self, result: Any) -> None:
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.device.type == self._device:
                self._follow(tensor.untyped_storage())
            elif is_pinned(tensor) or (self._unpinned and isinstance(tensor, FakeTensor)):
                self._follow_on_host(tensor.untyped_storage(), is_pinned(tensor))

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = whole_blocks(storage.nbytes())
        born = "update" if self._updating else "backward" if self._backward else "forward"
        block = Block(self._kind, born, self._passes, self._updates)
        self._seen[storage] = block
        self._log.append(Change(block, size))
        weakref.finalize(storage, self._forget, block, size)

    def _forget(self, block: Block, size: int) -> None:
        block.end = self._passes, self._updates
        self._log.append(Change(block, -size - block.others))

    def _kind_of(self, block: Block) -> str:
        if "data" in block.axes and block.kind in (None, "optimizer"):
            return "collectives"
        if block.kind is not None:
            return block.kind
        passes, updates = block.end or (self._passes, self._updates)
        if block.end is None and (updates > block.updates or block.born == "update"):
            return "gradients" if block.born == "backward" else "tables"
        if block.born == "forward" and passes > block.passes:
            return "activations"
        if block.axes:
            return "collectives"
        if block.born == "backward" and updates > block.updates:
            return "gradients"
        return "temporaries"

    def _follow_on_host(self, storage: torch.UntypedStorage, pinned: bool) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        if pinned:
            size = 1 << max(0, size - 1).bit_length()
        self._seen[storage] = Block("host", "", 0, 0)
        self.host_now += size
        self.host_peak = max(self.host_peak, self.host_now)
        weakref.finalize(storage, self._forget_on_host, size)

    def _forget_on_host(self, size: int) -> None:
        self.host_now -= size


@dataclass(eq=False)
class Block:
    """The life of a storage: of what kind somebody says that it is, in which pass it was born, how
    many backward passes and updates had begun by then, and by its end; the axes of the collectives
    that used it; bytes of others that it stands for."""

    kind: str | None
    born: str
    passes: int
    updates: int
    end: tuple[int, int] | None = None
    axes: frozenset[str] = frozenset()
    others: int = 0


class Change(NamedTuple):
    """A storage is made, or ends: its bytes, negative at the end."""

    block: Block
    size: int
