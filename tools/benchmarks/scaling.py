"""Time, memory and communication while the sequence grows: LongNet's Figure 5 and the claim of its
section 3.1 (arXiv 2307.02486), that a rank's traffic does not depend on the sequence's length.

    python tools/benchmarks/scaling.py length --output runs/scaling
    python tools/benchmarks/scaling.py share --output runs/scaling
    python tools/calibrate_device.py --ranks 2 --output runs/scaling/cluster.yaml
    python tools/benchmarks/scaling.py link --cluster runs/scaling/cluster.yaml \\
        --output runs/scaling
    python tools/benchmarks/scaling.py weak --output runs/scaling

length    One process, 2^13 to 2^20 tokens: attention of a layer forward and backward, dilated and
          dense (attention.py), and a training step of two layers (billion.py --ranks 1): seconds,
          seconds a token, memory at the peak.
share     The last rank of 2^20, 2^25 and 2^30 tokens, of which each rank has 2^17 (billion.py): the
          same model. Time and memory may differ by 10%, bytes a layer not at all.
link      A training step of 2, 4 and 8 ranks along the sequence axis, over links of limited
          bandwidth (limited_link.py; root on Linux): the share of it in communication, measured
          and predicted by the cost model from a description of that bandwidth.
weak      Dry runs of a 125M model with 2^20 tokens on each H100, up to 1,024 of them: predicted
          time of a step, share of communication, bytes and memory of a rank.

The first three want a machine that does nothing else. Each goes on where it was stopped, cell by
cell, and writes its JSON, a table (Markdown) and a plot into --output; share ends with status 1
where its bounds are broken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError

HERE = Path(__file__).resolve().parent
OURS, DENSE = "dilated (sdpa)", "dense (flash)"
# One core; the C library gives freed memory back at once, as a GPU's allocator would give it to the
# next tensor. billion.py sets the same for itself.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
# The model of length and share: heads of 16 numbers, so that a CPU can have a million tokens.
HEADS, HEAD_DIM, FIRST_SEGMENT = 4, 16, 2048
WEAK_SHAPE = "125M"


def main() -> int | None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments.command(arguments)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(required=True)

    def add(function):
        command = commands.add_parser(function.__name__, description=__doc__)
        command.set_defaults(command=function)
        command.add_argument("--output", type=Path, required=True, help="folder for the results")
        return command.add_argument

    option = add(length)
    lengths = [2**power for power in range(13, 21)]
    option("--lengths", type=int, nargs="+", default=lengths, help="tokens")
    option("--longest-dense", type=int, default=2**15, help="tokens of dense attention")
    option("--repeats", type=int, default=3, help="of each; fewer of long sequences")
    option = add(share)
    option("--tokens", type=int, nargs="+", default=[2**20, 2**25, 2**30], help="of the sequence")
    option("--shard-length", type=int, default=2**17, help="tokens of a rank")
    option("--spanning-rows", type=int, default=2**13, help="of a head, in the longest branch")
    option("--repeats", type=int, default=5, help="of attention")
    option("--step-repeats", type=int, default=2, help="of a training step")
    option = add(link)
    option("--cluster", required=True, help="this machine's, by tools/calibrate_device.py")
    option("--ranks", type=int, nargs="+", default=[2, 4, 8], help="of a launch")
    option("--shard-length", type=int, default=2048, help="tokens of a rank")
    option("--megabits", type=float, nargs="*", default=[1000, 300, 100], help="of limited links")
    option("--turns", type=int, default=2, help="of all bandwidths in a launch")
    option("--steps", type=int, default=2, help="of each in a turn")
    option = add(weak)
    option("--cluster", default="h100", help="NAME or FILE of its description")
    ranks = [2**power for power in range(11)]
    option("--ranks", type=int, nargs="+", default=ranks, help="along the sequence")
    option("--shard-length", type=int, default=2**20, help="tokens of a rank")
    option("--layers", type=int, help="of the model (default: as many as it has)")
    return parser.parse_args()


def length(arguments: Namespace) -> None:
    rows = []
    for tokens in arguments.lengths:
        folder = arguments.output / "length" / str(tokens)
        # Medians of fewer where these would have very many tokens together.
        repeats = min(arguments.repeats, max(1, 2**20 // tokens))
        attention = attention_of_length(arguments, tokens, repeats, folder / "attention")
        repeats = min(arguments.repeats, 2**17 // tokens)  # after a first step
        flags = f"--tokens {tokens} --ranks 1 --parts step --step-repeats {repeats}"
        step = billion(flags, folder / "step")["step"][0]
        seconds = step["runs"] or [step["first"]["seconds"]]
        found = {"seconds": step["seconds"]["step"], "processor": step["seconds"]["processor"]}
        found |= {"peak": step["peak"], "runs": len(seconds)}
        rows.append({"tokens": tokens, "attention": attention, "step": found})
        write(arguments.output / "length.json", rows)
    report_of("length", arguments.output, rows)


def attention_of_length(
    arguments: Namespace, tokens: int, repeats: int, folder: Path
) -> dict[str, Any]:
    """By contender, what attention.py says of one length."""
    file = folder / "attention.json"
    if not file.exists():
        flags = f"--patterns A --heads {HEADS} --head-dims {HEAD_DIM} --lengths {tokens}"
        flags += (
            f" --first-segment-length {FIRST_SEGMENT} --longest-dense {arguments.longest_dense}"
        )
        flags += f" --repeats {repeats}"
        script("attention.py", *flags.split(), "--contenders", OURS, DENSE, "--output", str(folder))
    found = json.loads(file.read_text())["results"]
    return {
        row["contender"]: {
            "seconds": row["forward+backward"]["seconds"],
            "least": row["forward+backward"]["least"],
            "largest": row["forward+backward"]["largest"],
            "peak": row["peak_memory_bytes"],
            "runs": repeats,
        }
        for row in found
    }


def share(arguments: Namespace) -> int:
    import scaling_report as report

    tokens = " ".join(map(str, arguments.tokens))
    common = f"--tokens {tokens} --shard-length {arguments.shard_length} --rank last"
    common += f" --spanning-rows {arguments.spanning_rows} --parts"
    parts = {"attention": f"--repeats {arguments.repeats}"}
    parts["step"] = f"--step-repeats {arguments.step_repeats}"
    folder = arguments.output / "share"
    found = {
        part: billion(f"{common} {part} {flags}", folder / part)[part]
        for part, flags in parts.items()
    }
    write(arguments.output / "share.json", found)
    report_of("share", arguments.output, found)
    return int(not all(report.is_flat(rows) for rows in found.values()))


def billion(flags: str, folder: Path) -> dict[str, Any]:
    """What billion.py says, of a model that is the same wherever it is called from here."""
    file = folder / "billion.json"
    if not file.exists():
        model = f"--heads {HEADS} --hidden-size {HEADS * HEAD_DIM} --first-segment {FIRST_SEGMENT}"
        script("billion.py", *flags.split(), *model.split(), "--output", str(folder))
    return json.loads(file.read_text())


def link(arguments: Namespace) -> None:
    from megalong.dry_run.calibration import raw_description
    from megalong.dry_run.cluster import load_cluster

    if not load_cluster(arguments.cluster).calibrated:
        raise UserError(
            f"--cluster {arguments.cluster} is not of a machine that was measured: give the file"
            " that tools/calibrate_device.py writes here"
        )
    calibrated = raw_description(arguments.cluster)
    from limited_link import require_limited_links
    from scaling_link import compared

    require_limited_links()
    rates = [None, *(1e6 * megabits for megabits in arguments.megabits)]
    settings = {"rates": rates, "turns": arguments.turns, "steps": arguments.steps}
    rows = []
    for ranks in arguments.ranks:
        print(f"{ranks} ranks ...", flush=True)
        folder = arguments.output / "link" / f"ranks-{ranks}"
        rows += compared(folder, ranks, arguments.shard_length, settings, calibrated)
        write(arguments.output / "link.json", rows)
    report_of("link", arguments.output, rows)


def weak(arguments: Namespace) -> None:
    from megalong.dry_run import fake_device

    fake_device.load()
    import torch

    fake_device.pretend()
    torch.set_num_threads(1)
    import scaling_weak

    from megalong.utils.command_line import filter_library_logs
    from megalong.utils.progress import progress_bar

    filter_library_logs()
    warnings.simplefilter("ignore")  # of libraries, about tensors that have no data

    shape = scaling_weak.shape(WEAK_SHAPE, arguments.layers)
    folder = arguments.output / "weak"
    folder.mkdir(exist_ok=True)
    rows = []
    pairs = [(pattern, n) for pattern in scaling_weak.PATTERNS for n in arguments.ranks]
    with progress_bar(len(pairs), "launch", "dry runs") as bar:
        for pattern, ranks in pairs:
            file = folder / f"{pattern}-{ranks}.json"
            if not file.exists():
                row = scaling_weak.planned(
                    shape, pattern, ranks, arguments.shard_length, arguments.cluster
                )
                write(file, row)
            rows.append(json.loads(file.read_text()))
            write(arguments.output / "weak.json", rows)
            bar.update()
    report_of("weak", arguments.output, rows)


def report_of(part: str, output: Path, found: Any) -> None:
    """The table, printed too, and the plot; that of length has what there is of share beside it."""
    import scaling_report as report

    text = report.TABLES[part](found)
    (output / f"{part}.md").write_text(text)
    print(text)
    if part in ("length", "share"):
        files = {name: output / f"{name}.json" for name in ("length", "share")}
        known = {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}
        report.plot_length(known, output / "length.png")
    else:
        report.PLOTS[part](found, output / f"{part}.png")


def script(name: str, *flags: str) -> None:
    """Run another benchmark; its output goes where ours goes."""
    command = [sys.executable, str(HERE / name), *flags]
    subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True)


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
