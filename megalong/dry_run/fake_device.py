"""A GPU that is not there, for fake tensors of device "cuda" on a machine without one.

    from megalong.dry_run import fake_device
    fake_device.load()   # before torch is imported
    import torch
    fake_device.pretend()  # before Megatron-core and DeepSpeed are imported

PyTorch's fake tensors have shapes, dtypes and devices but no data. A build without CUDA, and one
with it on a machine without a GPU, refuse to run autograd over those of device "cuda": that takes a
device guard and hooks, which `fake_device.cpp` has. Nothing in the process can use a GPU from then
on.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_suffix(".cpp")

# What the device says of itself: an H100.
NAME, CAPABILITY, MEMORY, PROCESSORS = "NVIDIA H100 (fake)", (9, 0), 80 * 2**30, 132

# ATen's operators that are one kernel on a GPU, and that PyTorch takes apart where there is none: a
# step would have other operators in a build without CUDA, and more memory between them.
WHOLE_ON_A_GPU = ("_fused_rms_norm", "silu_backward", "mish_backward")

_library: ctypes.CDLL | None = None


def load(cache: Path | None = None) -> None:
    """Compile the device, once for a version of PyTorch, and load it; before torch is imported.
    Where it is loaded already, nothing happens.

    cache: the folder that keeps the library; None is megalong's in the user's cache.
    Raises RuntimeError where torch is there already, or where there is no C++ compiler.
    """
    global _library
    if _library is not None:
        return
    if "torch" in sys.modules:
        raise RuntimeError("the fake device has to be loaded before torch is imported")
    torch = importlib.util.find_spec("torch")
    if torch is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    folder = Path(torch.origin).parent
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "megalong")
    version = folder.joinpath("version.py").read_bytes()
    key = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    library = cache / f"fake_device_{key}.so"
    if not library.exists():
        _compile(folder, library)
    for path in (folder / "lib/libc10.so", folder / "lib/libtorch_cpu.so", library):
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def compiler() -> str | None:
    """The C++ compiler at hand, or None."""
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _compile(torch: Path, library: Path) -> None:
    found = compiler()
    if found is None:
        raise RuntimeError("a dry run on a fake GPU needs a C++ compiler: install g++, or set CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as aside:
        made = Path(aside, library.name)
        command = [found, "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += [f"-I{torch}/include", f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the fake GPU does not compile: {done.stderr}")
        made.replace(library)


class Stream:
    """A queue of work on the device, which has no work."""

    def __init__(self, *_: Any, **__: Any):
        self.cuda_stream = 0

    def synchronize(self) -> None: ...

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """A place in such a queue."""

    def __init__(self, *_: Any, **__: Any): ...

    def synchronize(self) -> None: ...

    def wait(self, _: Any = None) -> None: ...

    def record(self, _: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def pretend() -> None:
    """Let `torch.cuda` speak of the device as of one that is there; after torch is imported.

    For this process, which can do nothing else from then on. Also for DeepSpeed.
    """
    assert _library is not None, "load() comes first"
    import torch

    _library.register_fake_guard()
    _leave_operators_whole()
    os.environ["DS_ACCELERATOR"] = "cuda"
    device, generator = torch.device("cuda", 0), torch.Generator()
    properties = SimpleNamespace(
        name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY,
        multi_processor_count=PROCESSORS, warp_size=32, max_threads_per_multi_processor=2048,
        shared_memory_per_block=48 * 2**10, shared_memory_per_block_optin=227 * 2**10,
        gcnArchName="", uuid="fake", is_integrated=False,
    )  # fmt: skip
    stream = Stream()
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": NAME,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "current_stream": stream,
        "default_stream": stream,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_stats": {},
        **dict.fromkeys(("memory_allocated", "max_memory_allocated"), 0),
        **dict.fromkeys(("memory_reserved", "max_memory_reserved"), 0),
        **dict.fromkeys(("set_device", "init", "_lazy_init", "empty_cache", "synchronize")),
        **dict.fromkeys(("reset_peak_memory_stats", "manual_seed", "manual_seed_all")),
        **dict.fromkeys(("reset_max_memory_allocated", "reset_max_memory_cached", "ipc_collect")),
        "initial_seed": 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.default_generators = (generator,)
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    torch.cuda.stream = torch.cuda.device = lambda _: contextlib.nullcontext()
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=device: generator.get_state()
        module.set_rng_state = lambda state, device=device: generator.set_state(state)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: None)


def _leave_operators_whole() -> None:
    """Let `WHOLE_ON_A_GPU` have kernels for the device, which nobody calls: tensors are fake."""
    import torch

    if torch.backends.cuda.is_built():
        return
    for name in WHOLE_ON_A_GPU:
        torch.library.impl(f"aten::{name}", "CUDA", _no_gpu)


def _no_gpu(*_: Any, **__: Any) -> None:
    raise RuntimeError("the GPU is a fake one, and so have its tensors to be")
