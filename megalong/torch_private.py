"""What PyTorch does not document and we need all the same: its names stand here and nowhere else,
but for the operators of its attention, which `megalong/attention/sdpa_operators.py` calls.

A test looks for all of them in the installed PyTorch.
"""

from __future__ import annotations

from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.utils._python_dispatch import TorchDispatchMode  # sees every operator, as it is called

__all__ = [
    "CHECKPOINT_CLASSES",
    "COLLECTIVES",
    "TorchDispatchMode",
    "record_memory_history",
    "slice_of_file",
    "write_memory_history",
]

# The operators of torch.ops.c10d, where every collective of every library ends up, and the names
# that people know them by.
COLLECTIVES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
    "recv_": "receive",
    "recv_any_source_": "receive",
}

# (module, name) of what torch.distributed.checkpoint pickles as its list of tensors.
_METADATA = "torch.distributed.checkpoint.metadata"
CHECKPOINT_CLASSES = {
    (_METADATA, name)
    for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}  # fmt: skip


def slice_of_file(reader: FileSystemReader, file: IO[bytes], piece: Any) -> IO[bytes]:
    """The part of a checkpoint's file that is one tensor, as a file that `torch.load` reads.

    piece: what the list of tensors says of where it is (`Metadata.storage_data`).
    """
    return reader._slice_file(file, piece)


def record_memory_history(events: int) -> None:
    """Remember from now on so many allocations and releases of the GPU's memory."""
    torch.cuda.memory._record_memory_history(max_entries=events)


def write_memory_history(path: str) -> None:
    """Write what was remembered, for https://pytorch.org/memory_viz, and forget it."""
    torch.cuda.memory._dump_snapshot(path)
    torch.cuda.memory._record_memory_history(enabled=None)
