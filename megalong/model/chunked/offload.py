"""Saved tensors of autograd wait for their backward pass in pinned memory of the host.

A block of `HostOffload.saving` is a layer: when autograd asks for what one has saved, that of the
block before begins to come back. Where that guess is wrong (a pipeline has several micro batches
under way) what is asked for comes later, but never wrong.

Streams. All copies run on one side stream, one after the other; everything else runs on the stream
that is current, here called the main one.
- A copy begins when the main stream has done what it was told before: it has then written what goes
  out, and no longer uses the memory that something comes into.
- PyTorch's allocator gives freed memory to whatever the same stream does next, so all device memory
  here is the main stream's, and none is freed before the main stream has been told to wait for the
  copy that reads or writes it: for what goes out, when the next block saves; for what has come,
  when it is used. With `Tensor.record_stream` the peak would differ from run to run.
- A chunk of pinned memory is touched by the side stream alone, so whoever gets it next comes after
  whoever had it, and the host never waits.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CHUNK = 32 * 2**20  # bytes: a power of two, since PyTorch rounds pinned memory up to one


class HostMemoryError(RuntimeError):
    """The host has not the pinned memory that is needed."""


class HostOffload:
    """Keeps what autograd saves in `saving` on the host, and brings it back for backward.

    Goes to the host: a dense floating-point tensor of the device that fills half a chunk and is not
    a parameter, once however often it is saved. Everything else stays, and on a CPU all. A tensor
    that somebody still holds on the device when it is asked for is not brought back. A block's come
    back while the one after it goes backward, for which the device holds those of two.

    device: of the activations. chunk: bytes of pinned memory, which is kept for later steps.
    transfers: the device; None is CUDA's.
    """

    def __init__(self, device: torch.device, *, chunk: int = CHUNK, transfers: Any = None):
        if transfers is None and device.type == "cuda":
            transfers = CudaTransfers(device)
        self._smallest = chunk // 2  # bytes: a chunk for less would be more than half empty
        self._transfers = transfers
        self._chunks = transfers and PinnedChunks(transfers.pinned, chunk)
        self._saved: weakref.WeakValueDictionary[int, _Saved] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._block = 0  # number of the latest

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned memory."""
        return self._chunks.bytes if self._chunks else 0

    def saving(self) -> contextlib.AbstractContextManager:
        """Send what autograd saves inside to the host.

        Raises HostMemoryError where that has no room. A tensor that is modified in place while it
        is copied is a RuntimeError, where the next block saves something or backward needs it.
        """
        if self._transfers is None:
            return contextlib.nullcontext()
        self._block += 1
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Saved:
        if not self._goes(tensor):
            return tensor
        self._let_go_of_all_but(self._block)
        kept = next((s.kept for s in self._living() if s.kept.is_of(tensor)), None)
        if kept is None:
            kept = _Kept(tensor, self._transfers, self._chunks)
        saved = _Saved(kept, self._block, tensor.dtype, tensor.size(), tensor.stride())
        self._saved[next(self._numbers)] = saved
        return saved

    def _goes(self, tensor: torch.Tensor) -> bool:
        owner = tensor if tensor._base is None else tensor._base
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((n - 1) * step for n, step in pairs)  # elements from first to last
        return (
            self._transfers.has(tensor)
            and tensor.is_floating_point()
            and tensor.nbytes >= self._smallest
            and tensor.numel() == extent
            and not isinstance(owner, torch.nn.Parameter)
        )

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        blocks = (s.block for s in self._living() if s.block < saved.block)
        before = max(blocks, default=None)  # the one that is expected next
        self._let_go_of_all_but(saved.block, before)
        self._bring(saved.block)
        saved.taken = True
        others = (s for s in self._living() if s.block == saved.block and not s.taken)
        data = saved.kept.take(keep=any(s.kept is saved.kept for s in others))
        self._bring(before)
        return data.view(saved.dtype).as_strided(saved.size, saved.stride)

    def _living(self) -> list[_Saved]:
        """What autograd may still ask for, in the order in which it was saved."""
        return list(self._saved.values())

    def _bring(self, block: int | None) -> None:
        for saved in self._living():
            if saved.block == block and not saved.taken:
                saved.kept.bring()

    def _let_go_of_all_but(self, *blocks: int | None) -> None:
        """Free the device of the tensors of other blocks: they are on the host, or soon will be."""
        living = self._living()
        needed = {id(s.kept) for s in living if s.block in blocks}
        for saved in living:
            if id(saved.kept) not in needed:
                saved.kept.check()
                saved.kept.let_go()


@dataclass(eq=False)
class _Saved:
    """What autograd holds in place of a tensor: where its bytes are, and how to look at them."""

    kept: _Kept
    block: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    taken: bool = False


class _Kept:
    """The bytes of a tensor: on the host as long as somebody has saved it; on the device until they
    are let go, and from when they are brought until they are taken."""

    def __init__(self, tensor: torch.Tensor, transfers: Any, pool: PinnedChunks):
        self.transfers, self.pool = transfers, pool
        self.tensor, self.storage = weakref.ref(tensor), weakref.ref(tensor.untyped_storage())
        self.version = tensor._version
        self.place = _place(tensor)
        self.device: torch.Tensor | None = None
        self.chunks: list[torch.Tensor] = []
        self.chunks = pool.take(tensor.nbytes)
        self._copy(_bytes_of(tensor), to_host=True)

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether they are the bytes that the tensor has now."""
        return (
            tensor.untyped_storage() is self.storage()
            and tensor._version == self.version
            and _place(tensor) == self.place
        )

    def bring(self) -> None:
        """Begin to bring them to the device, unless they are there."""
        if self.device is None and self._held() is None:
            self._copy(self.transfers.empty(self.place[1]), to_host=False)

    def take(self, *, keep: bool) -> torch.Tensor:
        """The bytes, on the device: the caller's, unless kept there for somebody else as well."""
        self.bring()
        if self.device is None:
            return _bytes_of(self._held())
        self.check()
        data = self.device
        self.transfers.current().wait_event(self.copied)
        if not keep:
            self.device = None
        return data

    def let_go(self) -> None:
        """Free the device's memory, once the copy that uses it is done."""
        if self.device is not None:
            self.stream.wait_event(self.copied)
            self.device = None

    def check(self) -> None:
        """Raise RuntimeError where somebody has written into the device's memory: autograd does not
        look at versions where there are hooks."""
        if self.device is not None and self.device._version != self.device_version:
            raise RuntimeError(
                f"a tensor of {self.place[1]} bytes that backward needs has been modified by an"
                " in-place operation while it was copied to the host, or before all had read it"
            )

    def _held(self) -> torch.Tensor | None:
        """The tensor itself, if somebody still holds it as it was saved."""
        tensor = self.tensor()
        return tensor if tensor is not None and self.is_of(tensor) else None

    def _copy(self, data: torch.Tensor, *, to_host: bool) -> None:
        main, side = self.transfers.current(), self.transfers.side
        side.wait_stream(main)
        for chunk, part in zip(self.chunks, data.split(self.pool.size), strict=True):
            pair = chunk[: len(part)], part
            self.transfers.copy(*(pair if to_host else reversed(pair)))
        self.device, self.device_version = data, data._version
        self.stream, self.copied = main, side.record_event()

    def __del__(self) -> None:
        self.let_go()
        self.pool.give_back(self.chunks)


class PinnedChunks:
    """Pinned memory in chunks of one size that are used again and again: it takes long to allocate,
    and PyTorch, which rounds it up to a power of two, would waste up to half.

    allocate: bytes -> pinned memory. size: of a chunk, bytes. bytes: of all chunks that there are.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor], size: int):
        self.allocate, self.size = allocate, size
        self.bytes = 0
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> list[torch.Tensor]:
        """Chunks for so many bytes. Raises HostMemoryError where the host has no room."""
        chunks: list[torch.Tensor] = []
        try:
            while len(chunks) * self.size < nbytes:
                chunks.append(self._free.pop() if self._free else self._new(nbytes))
        except HostMemoryError:
            self.give_back(chunks)
            raise
        return chunks

    def give_back(self, chunks: list[torch.Tensor]) -> None:
        """Of what comes next on the side stream, anything may use them."""
        self._free += chunks

    def _new(self, nbytes: int) -> torch.Tensor:
        try:
            chunk = self.allocate(self.size)
        except RuntimeError as error:
            raise HostMemoryError(
                f"{nbytes} bytes of activations do not fit beside {self.bytes} in pinned memory:"
                f" {error}"
            ) from error
        self.bytes += self.size
        return chunk


class CudaTransfers:
    """What `HostOffload` needs of a device: memory on both sides, and a side stream that copies."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on the device."""
        return tensor.device.type == "cuda"

    def current(self) -> torch.cuda.Stream:
        """The main stream."""
        return torch.cuda.current_stream(self.device)

    def empty(self, nbytes: int) -> torch.Tensor:
        """Memory of the device, of the main stream."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Memory of the host that the device reads and writes by itself."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Tell the side stream to copy."""
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Where the bytes of a dense tensor begin in its storage, and how many there are."""
    return tensor.storage_offset() * tensor.itemsize, tensor.nbytes


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor, in the order in which they lie: (bytes,) uint8, a view."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)
