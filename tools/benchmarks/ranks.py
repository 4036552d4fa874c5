"""A benchmark that starts itself again as the ranks of a launch on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def is_rank() -> bool:
    """Whether this process is one of the ranks."""
    return "RANK" in os.environ


def measured_on(ranks: int, folder: Path, *flags: str) -> dict:
    """Run this script again on so many processes, with further flags; what its rank 0 writes as
    JSON to --output, here a file in the folder."""
    file = folder / f"ranks-{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", *sys.argv, "--output", str(file), *flags]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    row = json.loads(file.read_text())
    file.unlink()
    return row


def join(device_type: str) -> torch.device:
    """Join the others, with one thread: gloo on "cpu", NCCL on "cuda". The device of this rank."""
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device(device_type, dist.get_rank())
    torch.cuda.set_device(device)
    return device
