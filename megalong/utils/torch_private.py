"""Undocumented names of PyTorch that several rooms need.

`megalong/attention/sdpa_operators.py` (`torch.ops.aten`) and `megalong/model/chunked/offload.py`
(tensors) hold the others. A test checks that all of them exist in the installed PyTorch and that no
other file uses such a name.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import (  # noqa: F401  # for others to import from here
    DataDependentOutputException,  # what a fake tensor says to `.item()`
    DynamicOutputShapeException,  # and to an index of booleans
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.checkpoint import FileSystemReader
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  # and backend "fake"
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: F401  # sees every operator
from torch.utils._pytree import tree_leaves  # noqa: F401

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
_METADATA = (
    "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
    "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
CHECKPOINT_CLASSES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


def process_groups() -> list[ProcessGroup]:
    """Return the groups that this process is a member of, in the order in which they were made."""
    return list(distributed_c10d._world.pg_map)


def slice_of_file(reader: FileSystemReader, file: IO[bytes], piece: Any) -> IO[bytes]:
    """Return the part of a checkpoint's file that is one tensor, as a file for `torch.load`.

    piece: where it is, of the checkpoint's list of tensors (`Metadata.storage_data`).
    """
    return reader._slice_file(file, piece)


def is_going_backward() -> bool:
    """Return whether autograd computes gradients right now, recomputation for them included."""
    return torch._C._current_graph_task_id() != -1


def current_node() -> Any:
    """Return the node of autograd's graph whose gradient is computed right now, if any."""
    return torch._C._current_autograd_node()


def written_arguments(operator: Any, args: Any, kwargs: dict[str, Any]) -> list[tuple[Any, bool]]:
    """Return what an operator of `torch.ops` is given to write into, and whether it is for results
    alone (out=)."""
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
    """Count the collectives that this process has begun and ended, by process group."""
    return {backend: found["pg_status"] for backend, found in _recorded(False).items()}


def open_collectives() -> Iterator[tuple[str, str]]:
    """Return the collectives that have begun and not ended, the oldest first: their name, such as
    "all_reduce", and that of the process group. Takes a while: the recorder keeps thousands."""
    entries = [e for f in _recorded(True).values() for e in f["entries"] if not e["retired"]]
    for entry in sorted(entries, key=lambda entry: entry["time_created_ns"]):
        yield entry["profiling_name"].partition(":")[2], entry["process_group"][0]


def write_collectives(path: Path) -> None:
    """Write PyTorch's record of this process's last collectives over NCCL, for `torchfrtrace`."""
    dump = torch._C._distributed_c10d._dump_nccl_trace
    path.write_bytes(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))


def _recorded(collectives: bool) -> dict[str, Any]:
    """Return what PyTorch's flight recorders know of what is under way, by backend."""
    recorders = {"gloo": torch._C._distributed_c10d._dump_fr_trace}
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        recorders["nccl"] = torch._C._distributed_c10d._dump_nccl_trace
    options = {"includeCollectives": collectives, "includeStackTraces": False, "onlyActive": True}
    return {backend: pickle.loads(dump(**options)) for backend, dump in recorders.items()}
