"""Launches on the CPU, measured by each of their ranks; and the dry runs of each of these.

    torchrun --nproc_per_node=2 predicted_ranks.py real FOLDER...
    python predicted_ranks.py dry FOLDER...

A FOLDER has case.json, {"ranks", "values", "vocabulary"}, and takes real-RANK.json and
dry-RANK.json of each rank: collectives by axis and name, FLOPs by part and direction, and bytes at
the peak. Memory of a real rank is what its tensors add up to, followed as in the dry run: the least
of a few engines', as a thread of Gloo may let go of a buffer only after the training has.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLLOWED = 3  # engines whose tensors are followed


def real(folders: list[Path]) -> None:
    """Train this rank of the launch, of one case after the other."""
    from megalong.parallel import process_group

    with process_group() as device:
        for folder in folders:
            real_case(folder, device, **read(folder))


def real_case(folder: Path, device: Any, ranks: int, values: dict, vocabulary: int) -> None:
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.memory import DeviceMemory

    config, peaks = config_from_values(values).resolve(ranks), []
    for _ in range(FOLLOWED):
        with DeviceMemory() as memory, engine(config, vocabulary, device) as trainer:
            work = some_steps(trainer, config)
            rank, traffic = trainer.mesh.rank, trainer.traffic
        del trainer
        gc.collect()
        peaks.append(memory.peak.total())
    write(folder / f"real-{rank}.json", traffic, work, {"followed": min(peaks), "peaks": peaks})


def dry(folders: list[Path]) -> None:
    """Every rank of every case, one after the other."""
    for folder in folders:
        dry_case(folder, **read(folder))


def dry_case(folder: Path, ranks: int, values: dict, vocabulary: int) -> None:
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import dry_run

    config = config_from_values(values).resolve(ranks)
    for rank in range(ranks):
        result = dry_run(config, vocabulary, rank=rank, ranks=ranks, quick=True)
        bytes_ = {"dry": result.memory.total(), "kinds": dict(result.memory)}
        write(folder / f"dry-{rank}.json", result.traffic, result.work, bytes_)


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
    {"real": real, "dry": dry}[kind](list(map(Path, folders)))


if __name__ == "__main__":
    main(*sys.argv[1:])
