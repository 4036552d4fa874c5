"""Launches on the CPU, measured by each of their ranks; and the dry runs of each of these.

    torchrun --nproc_per_node=2 predicted_ranks.py real FOLDER...
    torchrun --nproc_per_node=2 predicted_ranks.py timed FOLDER...
    python predicted_ranks.py dry FOLDER...

A FOLDER has case.json, {"ranks", "values", "vocabulary"}, and takes real-RANK.json and
dry-RANK.json of each rank: collectives by axis and name, FLOPs by part and direction, and bytes at
the peak.

Memory of a real rank is resident memory at its peak, over some steps of the training's engine, less
what the process has besides tensors: libraries, code, objects of Python. That is what was resident
before, with all that earlier engines have left behind (DeepSpeed's ZeRO 3 never lets go of its
module), and what the steps of a smaller model in the same layout had added to it, less its tensors.
The C library gives freed memory back at once (MALLOC_MMAP_THRESHOLD_), as a device's allocator
would give it to the next tensor. Beside it stands what the tensors of the real rank add up to,
which is followed as in the dry run: the least of a few engines', as a thread of Gloo may let go of
a buffer only after the training has.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory_measured import resident

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))  # a clone need not be installed

ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
FOR_MEMORY = {
    "MKL_DISABLE_FAST_MM": "1",  # it would keep its buffers
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
SMALLER = {"hidden_size": 64, "ffn_hidden_size": 128}
SMALL_VOCABULARY = 256
TURNS, STEPS = 2, 3  # of each launch that is timed
FOLLOWED = 3  # engines whose tensors are followed


def launch(kind: str, ranks: int, folders: list[Path]) -> None:
    """Run this script. Raises RuntimeError with what it printed where it fails."""
    command = [sys.executable]
    if kind != "dry":
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [__file__, kind, *map(str, folders)]
    variables = {**os.environ, **ENVIRONMENT, **(FOR_MEMORY if kind == "real" else {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the {kind} launch failed: {done.stderr[-6000:]}")


def real(folders: list[Path]) -> None:
    """This rank of the launch, of one case after the other."""
    from megalong.parallel import process_group

    with process_group() as device:
        for folder in folders:
            real_case(folder, device, **read(folder))


def real_case(folder: Path, device: Any, ranks: int, values: dict, vocabulary: int) -> None:
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.memory import DeviceMemory

    smaller = config_from_values(values | SMALLER).resolve(ranks)
    besides = besides_tensors(smaller, device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    config = config_from_values(values).resolve(ranks)
    with DeviceMemory() as memory, engine(config, vocabulary, device) as trainer:
        work = some_steps(trainer, config)
        measured = resident("VmHWM") - besides
        rank, traffic = trainer.mesh.rank, trainer.traffic
    del trainer
    peaks = [memory.peak.total()]
    for _ in range(FOLLOWED - 1):
        gc.collect()
        with DeviceMemory() as memory, engine(config, vocabulary, device) as trainer:
            some_steps(trainer, config)
        del trainer
        peaks.append(memory.peak.total())
    bytes_ = {"measured": measured, "followed": min(peaks), "peaks": peaks, "besides": besides}
    write(folder / f"real-{rank}.json", traffic, work, bytes_)


def besides_tensors(smaller: Any, device: Any) -> int:
    """Resident bytes that this process will have besides the tensors of its next engine."""
    from megalong.dry_run.memory import DeviceMemory

    for _ in range(2):  # the first has libraries load what they keep
        before = resident("VmRSS")
        with DeviceMemory() as memory, engine(smaller, SMALL_VOCABULARY, device) as trainer:
            some_steps(trainer, smaller)
            give_back()
            of_engine = resident("VmRSS") - memory.now - before
        del trainer, memory
        give_back()
    return resident("VmRSS") + of_engine


def give_back() -> None:
    """Memory that nobody needs, to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def dry(folders: list[Path]) -> None:
    """Every rank of every case, one after the other."""
    for folder in folders:
        dry_case(folder, **read(folder))


def dry_case(folder: Path, ranks: int, values: dict, vocabulary: int) -> None:
    from predicted_times import saved

    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import dry_run

    config = config_from_values(values).resolve(ranks)
    for rank in range(ranks):
        result = dry_run(config, vocabulary, rank=rank, ranks=ranks, quick=True)
        bytes_ = {"dry": result.memory.total(), "kinds": dict(result.memory)}
        (folder / f"work-{rank}.json").write_text(json.dumps(saved(result.work)))
        write(folder / f"dry-{rank}.json", result.traffic, result.work, bytes_)


def timed(folders: list[Path]) -> None:
    """This rank of launches that take turns, on a core of its own: seconds of steps."""
    import torch.distributed as dist

    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import host_batches
    from megalong.parallel import process_group

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    seconds: dict[Path, list[float]] = {folder: [] for folder in folders}
    with process_group() as device:
        for folder in list(folders) * TURNS:
            case = read(folder)
            config = config_from_values(case["values"]).resolve(case["ranks"])
            with engine(config, case["vocabulary"], device) as trainer:
                batches = host_batches(config, trainer.mesh)
                for _ in range(trainer.counted_step):
                    trainer.train_step(batches, config.training.lr)
                for _ in range(STEPS):
                    dist.barrier()
                    start = time.perf_counter()
                    trainer.train_step(batches, config.training.lr)
                    dist.barrier()  # a step is over when the last rank is done
                    seconds[folder].append(time.perf_counter() - start)
            del trainer
            gc.collect()
        if dist.get_rank() == 0:
            for folder, values in seconds.items():
                content = {"median": statistics.median(values), "seconds": values}
                (folder / "timed-0.json").write_text(json.dumps(content))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "case.json").read_text())


def some_steps(trainer: Any, config: Any) -> Any:
    """Steps up to that whose traffic the engine counts, the first that is like all that follow;
    what that one did."""
    from megalong.dry_run.fake_tensors import InsideAttention
    from megalong.dry_run.recorder import Parts, WorkRecorder
    from megalong.dry_run.step import host_batches

    batches, parts = host_batches(config, trainer.mesh), Parts()
    for _ in range(trainer.counted_step - 1):
        trainer.train_step(batches, config.training.lr)
    recorder = WorkRecorder(parts, trainer.mesh.groups_by_axis)
    with parts.watch(trainer.model), recorder, InsideAttention(recorder):
        trainer.train_step(batches, config.training.lr)
    return recorder.work


@contextlib.contextmanager
def engine(config: Any, vocabulary: int, device: Any) -> Iterator[Any]:
    """The training's engine of this rank."""
    from megalong.model.build import build_model
    from megalong.parallel import build_mesh
    from megalong.training.engine import TrainingEngine, weights_divider

    with build_mesh(config, device) as mesh:
        model = build_model(config, vocabulary, mesh, divide=weights_divider(config, mesh))
        trainer = TrainingEngine(model, config, mesh)
        try:
            yield trainer
        finally:
            trainer.deepspeed.destroy()


def write(file: Path, traffic: Any, work: Any, bytes_: dict[str, Any]) -> None:
    flops = {" ".join(key): count for key, count in sorted(work.flops().items()) if count}
    content = {"traffic": traffic or {}, "flops": flops, "memory": bytes_}
    file.write_text(json.dumps(content))


def main(kind: str, *folders: str) -> None:
    import torch

    torch.set_num_threads(1)
    {"real": real, "dry": dry, "timed": timed}[kind](list(map(Path, folders)))


if __name__ == "__main__":
    main(*sys.argv[1:])
