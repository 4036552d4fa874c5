"""Real steps of a small model on the CPU: peak of resident memory beside a dry run's, and time.

What is compared: resident memory of a process at its peak, over a step of the training's engine,
less what it was before the model was built, when a smaller model had made a step and all libraries
were loaded; and the bytes that the dry run of the same configuration counts on its device. The CPU
offloads nothing, so the pieces are on but for the offload; PyTorch's attention computes both, in
the dry run by the operators that it has for the CPU. The C library gives freed memory back at once
(MALLOC_MMAP_THRESHOLD_), as the device's allocator would give it to the next tensor.

As a script, one such process: `memory_measured.py real|dry|gpu CONFIG OUTPUT`, both files JSON.
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
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 8000
MODEL = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "ffn_hidden_size": 704,
    "make_vocab_size_divisible_by": 1,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "precision": "fp32",
    "tile_size": 4096,
    "attention_backend": "sdpa",
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
ON = {"memory_path": "on", "offload_activations": False}
RUNGS = {
    "full recomputation": {"memory_path": "off", **FULL},
    "all on, one tensor a layer": {**ON, **FULL},
    "all on, two tensors a layer": ON,
}
MEASURED = list(RUNGS)[1:]  # without them a long sequence needs more memory than most have

# Of gradients there are to be few at a time beside what is measured.
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 100_000}}
ENVIRONMENT = {
    "real": {
        "DS_ACCELERATOR": "cpu",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    },
    "dry": {},
}
BOUND = 0.05  # of the difference between measured and dry


def compare(rung: str, length: int) -> dict[str, Any]:
    """A real step and a dry one, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        deepspeed = Path(folder, "deepspeed.json")
        deepspeed.write_text(json.dumps(DEEPSPEED))
        values = MODEL | RUNGS[rung] | {"seq_length": length, "deepspeed_config": str(deepspeed)}
        real, dry = in_process("real", values), in_process("dry", values)
    return {
        "rung": rung,
        "length": length,
        "measured": real["peak"] - real["before"],
        "dry": dry["peak"],
        "difference": (real["peak"] - real["before"]) / dry["peak"] - 1,
        "process": real,
        "kinds": dry["kinds"],
    }


def take_turns(length: int, repeats: int) -> dict[str, Any]:
    """Steps of each rung in turn, each in a process of its own: seconds of each, and the medians
    beside that of the first rung."""
    seconds: dict[str, list[float]] = {rung: [] for rung in RUNGS}
    for _ in range(repeats):
        for rung in RUNGS:
            seconds[rung].append(timed(rung, length))
    medians = {rung: statistics.median(values) for rung, values in seconds.items()}
    base = next(iter(medians.values()))
    return {
        "length": length,
        "seconds": seconds,
        "medians": medians,
        "ratios": {rung: median / base for rung, median in medians.items()},
    }


def by_length(lengths: list[int], rungs: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    """The time per token of a step with everything on, by length: the median of `repeats` steps,
    of fewer where these would have more than a million tokens together."""
    for rung in rungs:
        for length in lengths:
            steps = max(1, min(repeats, 2**20 // length))
            seconds = [timed(rung, length) for _ in range(steps)]
            row = {"rung": rung, "length": length, "seconds": seconds}
            yield {**row, "microseconds_per_token": 1e6 * statistics.median(seconds) / length}


def timed(rung: str, length: int) -> float:
    """Seconds of a step in a process that has made a small one before. A process of its own: gloo
    leaves threads behind that go on polling when a model and its process groups are gone."""
    values = MODEL | RUNGS[rung] | {"seq_length": length}
    return in_process("real", values, environment={"DS_ACCELERATOR": "cpu"})["seconds"]


def in_process(
    kind: str,
    values: dict[str, Any],
    vocabulary: int = VOCABULARY,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What the script writes. Raises RuntimeError with what it printed where it fails."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, **(environment or ENVIRONMENT[kind])}
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
            values | {"num_layers": 1, "seq_length": 2 * values["tile_size"]}, device
        ) as step:
            step()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        with engine(values, device, vocabulary) as step:
            seconds = step()
        return {"before": before, "peak": resident("VmHWM"), "seconds": seconds}


@contextlib.contextmanager
def engine(values: dict[str, Any], device: Any, vocabulary: int = VOCABULARY) -> Iterator[Any]:
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
