"""Undocumented names of PyTorch that several rooms need.

`megalong/attention/sdpa_operators.py` (`torch.ops.aten`) and `megalong/model/chunked/offload.py`
(tensors) hold the others. A test checks that all of them exist in the installed PyTorch and that no
other file uses such a name.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,  # what a fake tensor says to `.item()`
    DynamicOutputShapeException,  # and to an index of booleans
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.checkpoint import FileSystemReader
from torch.testing._internal.distributed.fake_pg import FakeStore  # also makes the backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode  # sees every operator, as it is called
from torch.utils._pytree import tree_leaves

__all__ = [
    "CHECKPOINT_CLASSES",
    "COLLECTIVES",
    "EFFICIENT_ATTENTION",
    "FLASH_ATTENTION",
    "NAMES",
    "NAMES_WITH_NCCL",
    "READ_VALUE",
    "TO_COPY",
    "TO_PINNED",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "collective_counts",
    "current_node",
    "forget_memory_history",
    "is_going_backward",
    "open_collectives",
    "process_groups",
    "record_memory_history",
    "slice_of_file",
    "tree_leaves",
    "write_collectives",
    "write_memory_history",
    "written_arguments",
]

# (owner, name) of what this file takes as an attribute or imports.
NAMES = (
    (torch, "_C"),
    (torch, "_subclasses"),
    (torch.testing, "_internal"),
    (torch.utils, "_python_dispatch"),
    (torch.utils, "_pytree"),
    (torch._C, "_current_autograd_node"),
    (torch._C, "_current_graph_task_id"),
    (torch._C, "_distributed_c10d"),
    (torch._C._distributed_c10d, "_dump_fr_trace"),
    (distributed_c10d, "_world"),
    (torch.cuda.memory, "_dump_snapshot"),
    (torch.cuda.memory, "_record_memory_history"),
    (FileSystemReader, "_slice_file"),
    (torch.ops.aten, "_local_scalar_dense"),
    (torch.ops.aten, "_pin_memory"),
    (torch.ops.aten, "_scaled_dot_product_efficient_attention"),
    (torch.ops.aten, "_scaled_dot_product_flash_attention"),
    (torch.ops.aten, "_to_copy"),
    (torch.ops.aten.add_.Tensor, "_schema"),
)
NAMES_WITH_NCCL = ((torch._C._distributed_c10d, "_dump_nccl_trace"),)  # in builds that have it

# What `.item()`, `.to()` and `.pin_memory()` end up in.
READ_VALUE = torch.ops.aten._local_scalar_dense.default
TO_COPY = torch.ops.aten._to_copy.default
TO_PINNED = torch.ops.aten._pin_memory.default

# What PyTorch's dense attention runs on a GPU, in half precision and in float32.
FLASH_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
EFFICIENT_ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention

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


def process_groups() -> list[ProcessGroup]:
    """Those that this process is a member of, in the order in which they were made."""
    return list(distributed_c10d._world.pg_map)


def slice_of_file(reader: FileSystemReader, file: IO[bytes], piece: Any) -> IO[bytes]:
    """The part of a checkpoint's file that is one tensor, as a file that `torch.load` reads.

    piece: what the list of tensors says of where it is (`Metadata.storage_data`).
    """
    return reader._slice_file(file, piece)


def is_going_backward() -> bool:
    """Whether autograd is computing gradients right now, recomputation for them included."""
    return torch._C._current_graph_task_id() != -1


def current_node() -> Any:
    """The node of autograd's graph whose gradient is being computed right now; None if none is."""
    return torch._C._current_autograd_node()


def written_arguments(operator: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[Any, bool]]:
    """What an operator of `torch.ops` is given to write into, and whether it is for results alone
    (out=)."""
    if not operator._schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found.append((value, argument.is_out))
    return found


def record_memory_history(events: int) -> None:
    """Remember from now on so many allocations and releases of the GPU's memory."""
    torch.cuda.memory._record_memory_history(max_entries=events)


def write_memory_history(path: str) -> None:
    """Write what was remembered, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(path)


def forget_memory_history() -> None:
    """Remember nothing any more."""
    torch.cuda.memory._record_memory_history(enabled=None)


def collective_counts() -> dict[str, Any]:
    """How many collectives this process has begun and ended, by process group."""
    counts = {}
    for backend, dump in _flight_recorders().items():
        recorded = pickle.loads(
            dump(includeCollectives=False, includeStackTraces=False, onlyActive=True)
        )
        counts[backend] = recorded["pg_status"]
    return counts


def open_collectives() -> Iterator[tuple[str, str]]:
    """The collectives that this process has begun and that have not ended, the oldest first: their
    name, such as "all_reduce", and the name of the process group. Takes a while: the recorder
    keeps thousands."""
    entries = []
    for dump in _flight_recorders().values():
        recorded = pickle.loads(
            dump(includeCollectives=True, includeStackTraces=False, onlyActive=True)
        )
        entries += [entry for entry in recorded["entries"] if not entry["retired"]]
    for entry in sorted(entries, key=lambda entry: entry["time_created_ns"]):
        yield entry["profiling_name"].partition(":")[2], entry["process_group"][0]


def write_collectives(path: Path) -> None:
    """Write PyTorch's record of this process's last collectives over NCCL, for `torchfrtrace`."""
    dump = torch._C._distributed_c10d._dump_nccl_trace
    path.write_bytes(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))


def _flight_recorders() -> dict[str, Callable[..., bytes]]:
    recorders = {"gloo": torch._C._distributed_c10d._dump_fr_trace}
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        recorders["nccl"] = torch._C._distributed_c10d._dump_nccl_trace
    return recorders
