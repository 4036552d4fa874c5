"""What the benchmarks share: models, processes that make a training step, ranks of a launch.

As a script, one such process: `common.py real|dry|gpu CONFIG OUTPUT`, both files JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 32_000
# Llama's building blocks (RMSNorm, SwiGLU, RoPE, no biases) in sizes of GPT-3's, as fields of
# megalong's configuration. Embeddings are tied but in 7B, as in Llama 2.
SHAPES: dict[str, dict[str, Any]] = {
    "125M": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "ffn_hidden_size": 2048,
    },
    "760M": {
        "num_layers": 24,
        "hidden_size": 1536,
        "num_attention_heads": 16,
        "ffn_hidden_size": 4096,
    },
    "1.3B": {
        "num_layers": 24,
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "ffn_hidden_size": 5504,
    },
    "7B": {
        "num_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "ffn_hidden_size": 11008,
        "untie_embeddings_and_output_weights": True,
    },
}


# The C library gives freed memory back at once, as a GPU's allocator would give it to the next
# tensor.
CPU_MEMORY = {
    "DS_ACCELERATOR": "cpu",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
# Of gradients there are to be few at a time beside what is measured.
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 100_000}}


def flags(values: dict[str, Any]) -> str:
    """Fields of the configuration as flags of pretrain_longnet.py."""
    words = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value}")
    return " ".join(words)


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def axes_of(count: int = 1, width: float = 6, height: float = 4) -> tuple[Any, Any]:
    """Return a figure and a list of so many axes beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def is_rank() -> bool:
    """Return whether this process is one of the ranks."""
    return "RANK" in os.environ


def measured_on(ranks: int, folder: Path, *flags: str) -> dict:
    """Run this script again on so many processes, with further flags. Return what its rank 0 writes
    as JSON to --output, here a file in the folder."""
    file = folder / f"ranks-{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", *sys.argv, "--output", str(file), *flags]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    row = json.loads(file.read_text())
    file.unlink()
    return row


def join(device_type: str) -> Any:
    """Join the others, with one thread, by gloo or NCCL. Return the device of this rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    if device_type == "cpu":
        return torch.device("cpu")
    device = torch.device(device_type, dist.get_rank())
    torch.cuda.set_device(device)
    return device


def in_process(
    kind: str,
    values: dict[str, Any],
    vocabulary: int,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run this script in a process of its own, return what it writes. Raise RuntimeError with what
    it printed where it fails."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        config, output = Path(folder, "config.json"), Path(folder, "output.json")
        config.write_text(json.dumps([values, vocabulary]))
        command = [sys.executable, __file__, kind, str(config), str(output)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the {kind} step failed: {done.stderr[-2000:]}")
        return json.loads(output.read_text())


def real_step(values: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """Resident bytes before the model and at the peak of a step, and the step's seconds."""
    from megalong.parallel import process_group

    with process_group() as device:
        with engine(
            values | {"num_layers": 1, "seq_length": 2 * values["tile_size"]}, device, vocabulary
        ) as step:
            step()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        with engine(values, device, vocabulary) as step:
            seconds = step()
        return {"before": before, "peak": resident("VmHWM"), "seconds": seconds}


@contextlib.contextmanager
def engine(values: dict[str, Any], device: Any, vocabulary: int) -> Iterator[Any]:
    """A function that makes a training step and returns its seconds."""
    import torch

    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import host_batches
    from megalong.model.build import build_model
    from megalong.parallel import build_mesh
    from megalong.training.engine import TrainingEngine

    config = config_from_values(values).resolve(1)
    with build_mesh(config, device) as mesh:
        trainer = TrainingEngine(build_model(config, vocabulary, mesh), config, mesh)
        batches = host_batches(config, mesh)

        def step() -> float:
            start = time.perf_counter()
            trainer.train_step(batches, 1e-3)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        try:
            yield step
        finally:
            trainer.deepspeed.destroy()


def resident(which: str) -> int:
    """Bytes of this process: VmRSS is now, VmHWM the most there ever were."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


def dry_step(values: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The peak of the dry run, of what kind it is, and pinned memory of the host."""
    from megalong.dry_run import fake_device

    fake_device.load()
    import torch  # noqa: F401

    fake_device.pretend()
    from megalong.attention import sdpa_operators
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import dry_run

    config = config_from_values(values).resolve(1)
    with mock.patch.object(sdpa_operators, "operator_for", lambda _: sdpa_operators.CPU):
        result = dry_run(config, vocabulary, quick=True)
    return {"peak": result.memory.total(), "kinds": dict(result.memory), "host": result.host}


def gpu_step(values: dict[str, Any], vocabulary: int, steps: int = 3) -> dict[str, Any]:
    """Some steps on the device that there is; of the last the speed, of all the memory."""
    import torch

    from megalong.config.arguments import config_from_values
    from megalong.model.flops import executed_flops, peak_flops, step_flops
    from megalong.parallel import process_group

    config = config_from_values(values).resolve(1)
    with process_group() as device, engine(values, device, vocabulary) as step:
        seconds = [step() for _ in range(steps)]
        peak, _ = peak_flops(device, torch.bfloat16)
        result = {
            "tokens": config.model.seq_length,
            "step_seconds": seconds,
            "tokens_per_second": config.model.seq_length / seconds[-1],
            "mfu": sum(step_flops(config, vocabulary).values()) / seconds[-1] / peak,
            "executed": sum(executed_flops(config, vocabulary).values()) / seconds[-1] / peak,
        }
        if device.type == "cuda":
            result["peak"] = torch.cuda.max_memory_allocated(device)
            result["reserved"] = torch.cuda.max_memory_reserved(device)
            result["host"] = torch.cuda.host_memory_stats()["allocated_bytes.peak"]
        return result


KINDS = {"real": real_step, "dry": dry_step, "gpu": gpu_step}


def main(kind: str, config: str, output: str) -> None:
    values, vocabulary = json.loads(Path(config).read_text())
    Path(output).write_text(json.dumps(KINDS[kind](values, vocabulary)))


if __name__ == "__main__":
    main(*sys.argv[1:])
