"""Time of attention that keeps documents apart, beside the same attention of mixed documents.

On a CPU, from the repository's root (about ten minutes):

    python tools/benchmarks/documents.py --output runs/documents

Each kind of attention (as in attention.py) runs on one sequence of mixed documents, and on the same
sequence with so many documents, of random lengths, kept apart. They take turns, so that a slow
moment of the machine hits all of them; the numbers are medians over the turns, of the forward and
of the backward pass, and their ratios to those of mixed documents. What is planned of a batch is
planned before the first turn, since all layers share it: "plan" is how much longer the first pass
takes, forward and backward, with heads of one number.

Writes documents.json, documents.md and documents.png.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import torch
    from attention import KINDS, pattern_of
    from contenders import document_bounds

    from megalong.attention.dense import DensePasses
    from megalong.attention.dilated import DilatedPasses
    from megalong.attention.documents import Documents
    from megalong.attention.local import LocalPasses
    from megalong.attention.sparse import SparsePasses

PASSES = {"local": LocalPasses, "sparse": SparsePasses, "dense": DensePasses}


def main():
    args = parse_arguments()
    torch.set_num_threads(1)
    rows = []
    for kind, both_ways in product(args.kinds, (False, True) if args.both_ways else (False,)):
        for row in measure(args, kind, both_ways):
            print(row_text(row), flush=True)
            rows.append(row)
        if args.output:  # each time: a run that is cut off leaves what it has
            write(args, rows)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kinds", nargs="+", default=["A", *KINDS], choices=(*"ABL", *KINDS))
    add("--documents", type=int, nargs="+", default=[1, 16, 256, 2048, 16384])
    add("--length", type=int, default=32768, help="of the sequence, in tokens")
    add("--first-segment-length", type=int, default=2048, help="or window, or block")
    add("--heads", type=int, default=4)
    add("--head-dim", type=int, default=64)
    add("--both-ways", action="store_true", help="without a causal mask too")
    add("--repeats", type=int, default=3, help="turns")
    add("--output", type=Path, help="folder for the results")
    return parser.parse_args()


def measure(args, kind: str, both_ways: bool) -> list[dict]:
    """A row for mixed documents (0 of them) and for each number that is kept apart."""
    pattern = pattern_of(kind, args.length, args.first_segment_length)

    def passes(documents: int):
        bounds = Documents(*document_bounds(args.length, documents)) if documents else None
        options = {"backend": "sdpa", "causal": not both_ways, "documents": bounds}
        return PASSES.get(kind, DilatedPasses)(pattern, **options)

    attentions = {documents: passes(documents) for documents in (0, *args.documents)}
    thin, tensors = inputs(args, 1), inputs(args, args.head_dim)
    plans = {0: 0.0}
    for documents in args.documents:
        first, again = (sum(time_once(attentions[documents], *thin)) for _ in range(2))
        plans[documents] = max(first - again, 0.0)
    turns = {documents: [] for documents in attentions}
    for _ in range(args.repeats):
        for documents, attention in attentions.items():
            turns[documents].append(time_once(attention, *tensors))
    rows = []
    for documents, times in turns.items():
        forward, backward = map(statistics.median, zip(*times, strict=True))
        both = statistics.median(map(sum, times))
        found = {"forward": forward, "backward": backward, "forward+backward": both}
        mixed = rows[0]["seconds"] if rows else found
        rows.append(
            {
                "kind": kind, "both_ways": both_ways, "documents": documents, "seconds": found,
                "ratio": {name: found[name] / mixed[name] for name in found},
                "plan_seconds": plans[documents], "turns": times,
            }
        )  # fmt: skip
    return rows


def inputs(args, head_dim: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, args.length, args.heads, head_dim)
    return [torch.randn(shape, generator=generator) for _ in range(4)]


def time_once(attention, q, k, v, grad) -> tuple[float, float]:
    """Seconds that the core works in the forward and in the backward pass."""
    start = time.process_time()
    out, lse, kept = attention.forward(q, k, v)
    between = time.process_time()
    attention.backward(grad, q, k, v, out, lse, kept)
    return between - start, time.process_time() - between


def row_text(row: dict) -> str:
    name = row["kind"] + (" both ways" if row["both_ways"] else "")
    documents = row["documents"] or "mixed"
    text = f"| {name} | {documents} |"
    for measure, seconds in row["seconds"].items():
        text += f" {seconds:.3f} | {row['ratio'][measure]:.2f} |"
    return f"{text} {row['plan_seconds']:.2f} |"


def write(args, rows: list[dict]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    flags = {name: value for name, value in vars(args).items() if name != "output"}
    about = {"torch": torch.__version__, "dtype": "float32"}
    report = {"machine": about, "flags": flags, "results": rows}
    (args.output / "documents.json").write_text(json.dumps(report, indent=1) + "\n")
    command = [x for x in sys.argv[1:] if x != "--output" and x != str(args.output)]
    lines = [
        f"Documents kept apart beside mixed ones, {args.length} tokens, {args.heads} heads of "
        f"{args.head_dim}, float32: seconds that one core works, and times those of mixed ones.",
        "",
        f"    {shlex.join(['python', 'tools/benchmarks/documents.py', *command])}",
        "",
        "| attention | documents | forward | x | backward | x | both | x | plan |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(row_text, rows),
    ]
    (args.output / "documents.md").write_text("\n".join(lines) + "\n")
    plot(rows, args.output / "documents.png")


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for kind, both_ways in dict.fromkeys((row["kind"], row["both_ways"]) for row in rows):
        mine = [
            row
            for row in rows
            if (row["kind"], row["both_ways"]) == (kind, both_ways) and row["documents"]
        ]
        ratios = [row["ratio"]["forward+backward"] for row in mine]
        label = kind + (", both ways" if both_ways else "")
        axis.plot([row["documents"] for row in mine], ratios, "o-", label=label)
    axis.axhline(1, color="gray", linewidth=0.8)
    axis.set(xlabel="documents kept apart", ylabel="time / time of mixed documents", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
