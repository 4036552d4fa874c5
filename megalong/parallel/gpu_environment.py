"""Environment variables that PyTorch reads when it starts to use GPUs."""

from __future__ import annotations

import os

# Whichever is set, it is the user's word on PyTorch's allocator. CUDA's is the older name of the
# first, and wins where both are set.
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR_SETTINGS = "expandable_segments:True"

_DUMP_MILLISECONDS = "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"
DUMP_SECONDS = 15
# That many times PyTorch's watchdog waits between an error of NCCL and the end of the process.
_DUMPS = 4


def set_gpu_defaults() -> None:
    """Set what training wants otherwise than PyTorch, unless the user has set it.

    To be called before anything asks for a GPU. Two settings:

    Expandable segments: sequences of many lengths and layers that come and go otherwise leave holes
    in the memory that nothing fits into.

    Time for the watch over the ranks (`rank_watchdog`). When a rank dies, NCCL between nodes sees
    its connections close at the same moment as the watch does, and PyTorch then ends this process
    by an abort with pages of C++ frames. Before that it gives its flight recorder four times this
    setting, on every rank, a minute in all; within that the watch has said in one line which rank
    was lost, and has ended the process. (TORCH_NCCL_ASYNC_ERROR_HANDLING stays as it is: with
    PyTorch's milder modes a process goes on with numbers that a failed collective has left.)
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR_SETTINGS
    os.environ.setdefault(_DUMP_MILLISECONDS, str(1000 * DUMP_SECONDS))


def seconds_until_abort() -> float:
    """Between an error of NCCL, or its time limit, and the moment when PyTorch aborts."""
    return _DUMPS * DUMP_SECONDS
