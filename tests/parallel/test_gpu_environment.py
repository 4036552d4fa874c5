"""What is set for GPUs, as far as that can be told without one."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.comm.torch import TorchBackend

from megalong.parallel import mesh, rank_watchdog
from megalong.parallel.mesh import set_gpu_defaults

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back at the end
        monkeypatch.delenv(name)


def test_what_is_not_set_is_set():
    set_gpu_defaults()
    found = [os.environ.get(name) for name in NAMES]
    assert found == ["expandable_segments:True", None, "15000"]


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_users_word_on_the_allocator_counts(monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    set_gpu_defaults()
    assert {n: os.environ[n] for n in NAMES[:2] if n in os.environ} == {
        name: "max_split_size_mb:512"
    }


def test_the_watch_speaks_before_pytorch_aborts():
    """A node that falls silent is what takes the watch longest; a rank that fails has its own words
    first."""
    alive = rank_watchdog.KEEP_ALIVE
    probes = alive["TCP_KEEPIDLE"] + alive["TCP_KEEPINTVL"] * alive["TCP_KEEPCNT"]
    silence = max(probes, rank_watchdog.UNANSWERED / 1000)
    assert silence + rank_watchdog.OWN_WORDS < 4 * mesh.DUMP_SECONDS  # PyTorch waits so often


def test_this_pytorch_knows_the_variable():
    folder = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "distributed" / "c10d"
    assert f'"{NAMES[2]}"' in (folder / "ProcessGroupNCCL.hpp").read_text()


def test_deepspeed_binds_the_process_group_to_the_gpu(monkeypatch):
    """By which NCCL connects at once and splits the later groups off."""
    gpu = SimpleNamespace(device_name=lambda: "cuda", device=lambda i: torch.device("cuda", i))
    monkeypatch.setattr(sys.modules[TorchBackend.__module__], "get_accelerator", lambda: gpu)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    taken = []

    def init_process_group(backend, device_id=None, **_):
        taken.append(device_id)

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    TorchBackend.init_process_group(SimpleNamespace(), "nccl", timedelta(minutes=1), None, -1, -1)
    assert taken == [torch.device("cuda", 3)]
