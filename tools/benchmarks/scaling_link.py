"""A training step over links of limited bandwidth, measured and predicted: of `scaling.py link`.

Along the sequence axis, a shard of the same length on each rank. The links are those of
`limited_link`; the prediction is the cost model's, from dry runs of all ranks and a description of
this machine (tools/calibrate_device.py) in which the link between ranks has that bandwidth.

As a script, one rank: `scaling_link.py FOLDER NETWORK SETTINGS`, the last as JSON.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from limited_link import GOODPUT, Network, bytes_sent, limited_network
from predicted_cases import Case
from predicted_ranks import ENVIRONMENT, engine, launch, read

# gloo makes an all-reduce of a reduce-scatter, so twice the bytes go over a link.
TIMES_SENT = {"reduce_scatter": 2}
PROBE = 2**23  # bytes that one rank sends another, to see what a link carries


def case_of(ranks: int, shard: int) -> Case:
    """Branches inside the shard, and one over all ranks of which each head keeps half as many rows
    as a shard has: LongNet's section 3.1, whose traffic does not grow with the ranks."""
    return Case(
        ranks,
        {
            "sequence_parallel_size": ranks,
            "seq_length": shard * ranks,
            "segment_lengths": (shard // 4, shard, shard * ranks),
            "dilation_rates": (1, 2, 2 * ranks),
            "global_batch_size": 1,
        },
    )


def compared(
    folder: Path, ranks: int, shard: int, settings: dict[str, Any], calibrated: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each bandwidth: measured, and predicted. What the folder has is not done again.

    settings: "rates" in bits a second (None: no limit), "turns", and "steps" of each rate a turn.
    calibrated: the description of this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    case_of(ranks, shard).write(folder)
    if not (folder / f"dry-{ranks - 1}.json").exists():
        launch("dry", ranks, [folder])
    if not (folder / "measured.json").exists():
        (folder / "measured.json").write_text(json.dumps(measured(folder, ranks, settings)))
    found = json.loads((folder / "measured.json").read_text())
    return [
        {"ranks": ranks, "shard": shard, **row, **predicted(folder, ranks, row["rate"], calibrated)}
        for row in found
    ]


def measured(folder: Path, ranks: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """By bandwidth, in turns within one launch: medians of a step."""
    with limited_network(ranks) as network:
        words = [str(folder), network.name, json.dumps(settings)]
        network.run([sys.executable, __file__, *words], ENVIRONMENT)
    files = [folder / f"steps-{rank}.json" for rank in range(ranks)]
    of_ranks = [json.loads(file.read_text()) for file in files]
    for file in files:
        file.unlink()
    rows = []
    for number, rate in enumerate(settings["rates"]):
        steps = list(zip(*(found[number] for found in of_ranks), strict=True))
        seconds = [max(rank["seconds"] for rank in step) for step in steps]
        inside = [statistics.mean(r["inside"] / r["seconds"] for r in step) for step in steps]
        sent = [statistics.mean(rank["sent"] for rank in step) for step in steps]
        rows.append(
            {
                "rate": rate,
                "seconds": statistics.median(seconds),
                "all_seconds": seconds,
                "inside": statistics.median(inside),
                "sent": statistics.median(sent),
                "carried": statistics.median(step[0]["carried"] for step in steps),
            }
        )
    return rows


def predicted(
    folder: Path, ranks: int, rate: float | None, calibrated: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of a step, of them communication that nothing hides, and bytes that a rank sends."""
    import yaml
    from predicted_times import loaded, predicted_seconds

    from megalong.dry_run.calibration import THROUGH

    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(with_link(calibrated, ranks, rate), sort_keys=False))
    cost = predicted_seconds(folder, str(file))
    file.unlink()
    communication = sum(cost["parts"]["communication"].values())
    sent = sum(
        calls * call.bytes * THROUGH[call.name](len(call.ranks))[0] * TIMES_SENT.get(call.name, 1)
        for call, calls in loaded(folder / "work-0.json").collectives.items()
    )
    return {
        "predicted": {
            "seconds": cost["predicted"],
            "communication": communication,
            "by_axis": cost["parts"]["communication"],
            "sent": sent,
        }
    }


def with_link(calibrated: dict[str, Any], ranks: int, rate: float | None) -> dict[str, Any]:
    """The description with links of so many bits a second; None leaves them as they are.

    Ranks that share a core have a part of it: computation, calls and copies take so much longer. A
    collective gets the limit, or what it gets without one where that is less.
    """
    values = copy.deepcopy(calibrated)
    share = max(1.0, ranks / values["gpus_per_node"])
    device, link = values["device"], values["within_node"]
    device["peak_flops"] = {name: peak / share for name, peak in device["peak_flops"].items()}
    device["memory_bandwidth"] /= share
    device["kernel_seconds"] *= share
    values["collective_seconds"] *= share
    link["bandwidth"] /= share
    link["latency"] *= share
    values["gpus_per_node"] = ranks
    if rate is None:
        return values
    limit = rate / 8 * GOODPUT
    attainable = {
        name: [
            [size, min(1 / TIMES_SENT.get(name, 1), part * link["bandwidth"] / limit)]
            for size, part in curve
        ]
        for name, curve in link["attainable"].items()
    }
    values["within_node"] = {**link, "bandwidth": limit, "attainable": attainable}
    return values


# ------------------------------------------------------------------------------ a rank


def main(folder: str, network: str, settings: str) -> None:
    """As one rank: steps-RANK.json, for each rate and step its seconds, those of them in which this
    rank waited for a collective, and the bytes that it sent."""
    import torch
    import torch.distributed as dist

    from megalong.config.arguments import config_from_values
    from megalong.dry_run.step import host_batches
    from megalong.parallel import process_group

    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    chosen, case = json.loads(settings), read(Path(folder))
    config = config_from_values(case["values"]).resolve(case["ranks"])
    found: list[list[dict[str, float]]] = [[] for _ in chosen["rates"]]
    with (
        time_in_collectives() as inside,
        process_group() as device,
        engine(config, case["vocabulary"], device) as trainer,
    ):
        rank, batches = dist.get_rank(), host_batches(config, trainer.mesh)
        links = Network(network, case["ranks"])
        trainer.train_step(batches, config.training.lr)  # counts its traffic
        for _ in range(chosen["turns"]):
            for rate, of_rate in zip(chosen["rates"], found, strict=True):
                dist.barrier()
                if rank == 0:
                    links.limit(rate)
                dist.barrier()
                carried = probed(rank)
                trainer.train_step(batches, config.training.lr)  # TCP finds the new rate
                for _ in range(chosen["steps"]):
                    dist.barrier()
                    inside[0], sent, start = 0.0, bytes_sent(), time.perf_counter()
                    trainer.train_step(batches, config.training.lr)
                    waited = inside[0]
                    dist.barrier()  # a step is over when the last rank is done
                    row = {"seconds": time.perf_counter() - start, "inside": waited}
                    of_rate.append({**row, "sent": bytes_sent() - sent, "carried": carried})
        dist.barrier()
        if rank == 0:
            links.limit(None)
    Path(folder, f"steps-{rank}.json").write_text(json.dumps(found))


def probed(rank: int) -> float:
    """Bits a second that the link between the first two ranks carries of a program's bytes."""
    import torch
    import torch.distributed as dist

    content = torch.zeros(PROBE // 4)
    dist.barrier()
    start = time.perf_counter()
    if rank == 0:
        dist.send(content, 1)
    elif rank == 1:
        dist.recv(content, 0)
    dist.barrier()
    return 8 * PROBE / (time.perf_counter() - start)


@contextlib.contextmanager
def time_in_collectives() -> Iterator[list[float]]:
    """Inside, one number: the seconds that this process has waited for a collective's end."""
    import torch.distributed as dist

    seconds, wait = [0.0], dist.Work.wait

    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(*arguments, **options)
        finally:
            seconds[0] += time.perf_counter() - start

    with mock.patch.object(dist.Work, "wait", timed):
        yield seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
