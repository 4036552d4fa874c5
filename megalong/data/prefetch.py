"""Batches made ahead of the training, one at a time, by a thread of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from megalong.data.batches import Batch


@contextlib.contextmanager
def made_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Iterator[Batch]]:
    """Yields an iterator of the same batches, each made while the one before is in use; at the end
    of the context its thread is gone, and a batch that nobody took is forgotten.

    Where a run stands in its data does not hang on it: what was trained on counts, not what was
    made (`megalong.checkpoint.content`).

    batches: read by the thread alone from now on. What it raises is raised by the new iterator,
        where the batch would have come.
    device: where the batches go. For a GPU they are put into pinned memory, from which a copy runs
        beside the computation (`Tensor.to(non_blocking=True)`).
    """
    pinned = device.type == "cuda"

    def make() -> Batch | None:
        batch = next(batches, None)
        if batch is not None and pinned:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    # Pinned memory belongs to the current device, which every thread has to set for itself.
    begin = {"initializer": torch.cuda.set_device, "initargs": (device,)} if pinned else {}
    with ThreadPoolExecutor(1, thread_name_prefix="data", **begin) as thread:
        first = thread.submit(make)

        def ahead() -> Iterator[Batch]:
            following = first
            while (batch := following.result()) is not None:
                following = thread.submit(make)
                yield batch

        yield ahead()
