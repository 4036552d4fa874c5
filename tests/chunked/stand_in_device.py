"""A device that is the CPU, but whose side stream copies as late as it may.

Only where the main stream waits for a copy is it made, so whoever does not wait reads rubbish. What
a real device forgives on most days is an error here (`Race`): a copy that does not wait for those
who wrote or used its memory, memory that is freed while a copy is to use it, and an operator that
reads what has not arrived.
"""

import ctypes
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Race(AssertionError):
    """What happens next depends on which of two streams is faster."""


class StandIn(TorchDispatchMode):
    """As `offload.CudaTransfers`; inside, operators are the main stream's work.

    out, into: bytes copied to the host and to the device. waits: turned off, in the main stream
    ("main") or in the side stream ("side"), these show what a forgotten wait does.
    """

    def __init__(self, without: str | None = None):
        super().__init__()
        self.without = without
        self.side, self.main = self, self
        self.clock = 0  # of the main stream
        self.seen = 0  # by the side stream, of that clock
        self.used = weakref.WeakKeyDictionary()  # storage -> when an operator last touched it
        self.queue = []  # copies to be made: (storage of the device, target, source, bytes)
        self.host = weakref.WeakSet()  # pinned storages
        self.done = 0
        self.copied = Counter()

    # What the operators do.

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {x.untyped_storage() for x in tensors((args, kwargs))}
        result = operator(*args, **(kwargs or {}))
        made = {x.untyped_storage() for x in tensors(result)}
        if operator._schema.is_mutable or not made <= given:  # not only a view
            self.clock += 1
            waiting = [copy.device for copy in self.queue if copy.into]
            if any(storage is other() for storage in given for other in waiting):
                raise Race(f"{operator} uses what has not arrived")
            for storage in given | made:
                self.used[storage] = self.clock
        return result

    # What `HostOffload` asks for.

    def has(self, tensor):
        return True

    def current(self):
        return self

    def empty(self, nbytes):
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # not a number, in every dtype

    def pinned(self, nbytes):
        chunk = self.empty(nbytes)
        self.host.add(chunk.untyped_storage())
        return chunk

    def wait_stream(self, main):
        if self.without != "side":
            self.seen = self.clock

    def record_event(self):
        return self.done + len(self.queue)

    def wait_event(self, event):
        if self.without != "main":
            self.run(event)

    def copy(self, target, source):
        into = source.untyped_storage() in self.host
        assert into != (target.untyped_storage() in self.host) and len(target) == len(source)
        device = (target if into else source).untyped_storage()
        if self.used.get(device, 0) > self.seen:
            raise Race("a copy begins before the main stream is done with its memory")
        self.copied["into" if into else "out"] += len(target)
        self.queue.append(Copy(device, target, source, into))

    def run(self, until=None):
        """Make the copies, up to an event."""
        while self.queue and (until is None or self.done < until):
            self.queue.pop(0).make()
            self.done += 1


class Copy:
    def __init__(self, device, target, source, into):
        self.device, self.into = weakref.ref(device), into
        self.addresses = target.data_ptr(), source.data_ptr(), len(target)

    def make(self):
        if self.device() is None:
            raise Race("memory is freed while a copy is to use it")
        ctypes.memmove(*self.addresses)


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
