"""Measure this machine's device and the links between its ranks, for the cost model of plans.

    python tools/calibrate_device.py --output my_cluster.yaml
    python tools/calibrate_device.py --output my_cluster.yaml --ranks 2

Writes a description for `--cluster my_cluster.yaml`, and says in it, and at its end, what of it was
measured:
- the rates of products by size and precision, of attention forward and backward by size, and of
  memory by size; what calling an operator takes;
- of a GPU also what a kernel takes, and the way to its host;
- with several ranks the latency and the bandwidth of each collective between them, and how much of
  a collective runs beside computation.
Everything else (peaks, links between nodes, memory, the price) stays as it is in --cluster: what is
attainable is a share of the peaks there. Without it, a GPU's is the first cluster that has such a
card; a CPU's peaks are the best rates measured, memory is what the machine has, and a few figures
are assumed.
All ranks measure at the same time, each on a GPU (NCCL), or on one core (gloo): of a CPU that is
the device, as training has it with OMP_NUM_THREADS=1. A minute, in which nothing else should run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, system_errors_of

if TYPE_CHECKING:
    import torch

    from megalong.dry_run.calibration import Clock


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.yaml", help="the description")
    add(
        "--ranks",
        type=int,
        help="processes, each with a GPU or a core (default: as many as there are)",
    )
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    add(
        "--cluster",
        metavar="NAME|FILE",
        help="the description of what is not measured (default: the first with this GPU; none on a"
        " CPU)",
    )
    add("--name", help="of the described cluster (default: from the device)")
    add("--seconds", type=float, default=0.2, help="to repeat each call for")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.seconds <= 0:
        raise UserError(f"--seconds {args.seconds:g} must be positive")

    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    there = torch.cuda.device_count() if args.device == "cuda" else len(os.sched_getaffinity(0))
    args.ranks = args.ranks or there
    if not 1 <= args.ranks <= there:
        what = "GPUs" if args.device == "cuda" else "cores"
        raise UserError(f"--ranks {args.ranks}: this machine has {there} {what}")
    args.cluster = args.cluster or cluster_with_this_card(args)
    base = description_beside(args)
    if "RANK" not in os.environ and args.ranks > 1:
        launch(args)
        return
    measure(args, base)


def cluster_with_this_card(args: argparse.Namespace) -> str | None:
    """The first that is known to have it; None on a CPU."""
    import torch

    from megalong.dry_run.cluster import cluster_names, load_cluster

    if args.device != "cuda":
        return None
    card = torch.cuda.get_device_name()
    known = [name for name in cluster_names() if load_cluster(name).device.name == card]
    if not known:
        raise UserError(
            f"no cluster that we know has a {card}: give --cluster FILE, a description with its"
            " data sheet's figures"
        )
    return known[0]


def description_beside(args: argparse.Namespace) -> dict[str, Any] | None:
    """What is not measured; None on a CPU without --cluster, where nothing more is needed."""
    from megalong.dry_run.calibration import raw_description
    from megalong.dry_run.cluster import load_cluster

    if args.cluster is None:
        return None
    if load_cluster(args.cluster).device.on_gpu != (args.device == "cuda"):
        raise UserError(
            f"--cluster {args.cluster} is not of a {args.device} device, which is what is measured"
        )
    return raw_description(args.cluster)


def launch(args: argparse.Namespace) -> None:
    """This command again, on every rank."""
    with system_errors_of("--output", args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={args.ranks}", *sys.argv]
    command += ["--ranks", str(args.ranks), "--device", args.device]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def measure(args: argparse.Namespace, base: dict[str, Any] | None) -> None:
    """All there is to measure, on this rank; the first one writes it."""
    import torch
    import torch.distributed as dist

    from megalong.dry_run.calibration import Clock, write
    from megalong.utils.command_line import filter_library_logs

    warnings.filterwarnings("ignore")  # of names of collectives, and of what is not installed
    filter_library_logs()
    torch.set_num_threads(1)
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", "0")))
    if args.device == "cuda":
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if args.ranks > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    clock = Clock(device, args.seconds)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    say = print if is_main else lambda *_, **__: None
    values, measured = described(args, clock, base, say)
    if is_main:
        lines = [f"Measured: {', '.join(measured)}.", *not_measured(args)]
        with system_errors_of("--output", args.output):
            write(values, args.output, lines)
        say("\n".join([f"wrote {args.output}: --cluster {args.output}", *lines]))
    if dist.is_initialized():
        dist.destroy_process_group()


def described(
    args: argparse.Namespace, clock: Clock, base: dict[str, Any] | None, say
) -> tuple[dict[str, Any], list[str]]:
    """The content of the file, and which of its keys were measured."""
    from megalong.dry_run.calibration import (
        host_bandwidth,
        measured_device,
        measured_links,
        rounded,
    )

    values = base or cpu_description(args)
    card = card_name(clock.device)
    say(f"{card}, {args.ranks} at the same time")
    values["device"] = measured_device(clock, values["device"], base is None, say)
    ranks = f"{args.ranks} rank{'s' if args.ranks > 1 else ''}"
    values["device"]["calibrated"] = f"{datetime.date.today()}, {card}, {ranks} at a time"
    measured = ["device.attainable", "device.kernel_seconds"]
    if base is None:
        measured = ["device.peak_flops", "device.memory_bandwidth", *measured]
    if args.name:
        values["name"] = args.name
    if args.device == "cuda":
        rate = rounded(host_bandwidth(clock))
        values["host"] = {**values["host"], "bandwidth": rate, "attainable": 1.0}
        measured += ["device.launch_seconds", "host.bandwidth"]
    if args.ranks > 1:
        say("collectives")
        values["device"]["overlap"], values["collective_seconds"], link = measured_links(clock)
        values["within_node"] = {"name": values["within_node"]["name"], **link}
        measured += ["device.overlap", "collective_seconds", "within_node"]
    return values, measured


def not_measured(args: argparse.Namespace) -> list[str]:
    """Where everything else in the file is from, a line each."""
    if args.cluster is not None:
        return [f"As in --cluster {args.cluster}: everything else."]
    assumed = ["host.bandwidth", "price_per_gpu_hour"]
    if args.ranks == 1:
        assumed = ["within_node", "collective_seconds", "device.overlap", *assumed]
    return [
        "As the machine says: device.memory (an even share of it), host.memory.",
        f"Assumed, and yours to set: {', '.join(assumed)}.",
    ]


def cpu_description(args: argparse.Namespace) -> dict[str, Any]:
    """Of a machine without a GPU, where each rank has a core: all but what is measured."""
    import torch

    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    card = card_name(torch.device("cpu"))
    device = {"name": f"{card}, one core", "kind": "cpu", "memory": memory / args.ranks}
    # What is not measured of it is named in `not_measured`.
    assumed = {"bandwidth": 1.0e9, "attainable": 1.0, "latency": 1.0e-4}
    return {
        "name": f"{card}, {args.ranks} x 1 core",
        "device": {**device, "peak_flops": {}, "memory_bandwidth": 0, "overlap": 0.0},
        "gpus_per_node": args.ranks,
        "within_node": {"name": "gloo over the loopback device", **assumed},
        "collective_seconds": 1.0e-4,
        "host": {"memory": memory, "bandwidth": 1.0e10, "attainable": 1.0},
        "price_per_gpu_hour": 0.05,
    }


def card_name(device: torch.device) -> str:
    """Of a GPU, or of the processor."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


if __name__ == "__main__":
    run(main)
