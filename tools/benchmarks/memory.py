"""Memory of a training step by token: dry runs, and real steps beside them.

    python tools/benchmarks/memory.py ladder --output runs/memory

ladder    Dry runs on a GPU that is not there: bytes per token at the peak, by kind and with each
          feature on and off, FLOPs executed, and the longest sequence on a device of 80 GB, for
          models of 125M to 7B parameters. Half an hour on one core; goes on where it was stopped.
measured  Real steps of a small model on the CPU, each length in a process of its own: the peak of
          resident memory, less what it was when a smaller model had made a step, beside a dry
          run's. Ends with status 1 where they differ by more than 5%. Ten minutes on two cores;
          goes on where it was stopped.

Each writes its JSON into --output, and a table (Markdown) and a plot.

A cell of the ladder is one dry run: a shape, a rung, a number of layers and a length. All layers
are alike, and a tile of a sequence is like any other, so few layers and moderate lengths tell of
all: bytes at the peak are linear in the layers and, with many tiles, in the tokens.
What is told of a length is run at that length afterwards, with the same few layers.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import CPU_MEMORY, DEEPSPEED, SHAPES, VOCABULARY, axes_of, in_process, write

from megalong.utils.command_line import ArgumentParser, needed_packages, run
from megalong.utils.errors import UserError, did_you_mean

with needed_packages():
    from megalong.config import Config
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.work import MEMORY
    from megalong.utils.progress import progress_bar

GIB = 2**30
USABLE = 76 * GIB  # of a device of 80 GiB: the rest is for CUDA's context, NCCL and fragments
LAYERS = (2, 3)
# Weights, gradients and optimizer of 7B do not fit: ZeRO 3 over so many ranks, a sequence on each.
RANKS = {"7B": 8}

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
PIECES = ("linear_cross_entropy", "tiled_mlp", "tiled_attention", "offload_activations")
OFF, ON = {"memory_path": "off"}, {"memory_path": "on"}


def _with(count: int) -> dict[str, bool]:
    return dict.fromkeys(PIECES[:count], True)


# What is switched on. "on" is all four pieces; with full recomputation a layer leaves one tensor,
# its input, without it two, also the attention's output (and a float a head).
RUNGS: dict[str, dict[str, Any]] = {
    "plain": OFF,
    "full recomputation": {**OFF, **FULL},
    "+ linear cross entropy": {**OFF, **FULL, **_with(1)},
    "+ tiled MLP": {**OFF, **FULL, **_with(2)},
    "+ tiled attention: all on but offload": {**OFF, **FULL, **_with(3)},
    "+ offload: all on, one tensor a layer": {**ON, **FULL},
    "all on, two tensors a layer": ON,
    "all on but linear cross entropy": {**ON, **FULL, "linear_cross_entropy": False},
    "all on but tiled MLP": {**ON, **FULL, "tiled_mlp": False},
    "all on but tiled attention": {**ON, **FULL, "tiled_attention": False},
}
CONFIRMED = list(RUNGS)[:7]  # those whose longest sequence is run


BASE = "full recomputation"
MODEL = ("weights", "gradients", "optimizer")
HEADER = (
    "rung", "device B/token at {}", "{}", "{}", "per token more", "activations", "temporaries",
    "host", "weights, gradients, optimizer", "MFLOP/token", "of full recomputation",
    "longest in {}", "host at that length", "dry run there",
)  # fmt: skip
# Of the real steps: the CPU offloads nothing, and PyTorch's attention computes both sides.
SMALL_VOCABULARY = 8000
SMALL = {
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
MEASURED = {
    "all on, one tensor a layer": {**ON, "offload_activations": False, **FULL},
    "all on, two tensors a layer": {**ON, "offload_activations": False},
}
BOUND = 0.05  # of the difference between measured and dry


@dataclass(frozen=True)
class Cell:
    """One dry run."""

    shape: str
    rung: str
    layers: int
    length: int

    @property
    def file(self) -> str:
        """The name of its file: letters, digits and dashes."""
        words = "".join(x if x.isalnum() else " " for x in self.rung).split()
        return f"{self.shape}-{'-'.join(words)}-{self.layers}-{self.length}.json"


@dataclass(frozen=True)
class Plan:
    """What is run: models by name (fields of the configuration), and three lengths.

    usable: bytes of the device that the longest sequence may take. step: tokens of which it is a
    multiple.
    """

    shapes: dict[str, dict[str, Any]]
    lengths: tuple[int, ...]
    usable: int = USABLE
    step: int = 4096
    vocabulary: int = VOCABULARY

    def cells(self, shape: str, rung: str) -> list[Cell]:
        """Those that a row of the table is made of."""
        few = [Cell(shape, rung, LAYERS[0], length) for length in self.lengths]
        more = [Cell(shape, rung, LAYERS[1], length) for length in self.lengths[:2]]
        return few + more


# At shorter ones the peak of a small model is elsewhere in the step, and the lines are other ones.
PLAN = Plan(SHAPES, (131_072, 262_144, 524_288))
TINY = Plan(  # to see that it works
    {
        "tiny": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 128,
            "loss_chunk_size": 512,
            "tile_size": 512,
        }
    },
    (1024, 2048, 4096),
    usable=16 * 2**20,
    step=512,
    vocabulary=500,
)


class Cells:
    """Results of a plan's cells, each run once: kept in a folder, and found there again.

    done: called after each dry run.
    """

    def __init__(self, folder: Path, plan: Plan, done: Callable[[], object] = lambda: None):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.plan, self.done = folder, plan, done

    def __getitem__(self, cell: Cell) -> dict[str, Any]:
        path = self.folder / cell.file
        if not path.exists():
            path.write_text(json.dumps(self._run(cell)) + "\n")
            self.done()
        return json.loads(path.read_text())

    def _run(self, cell: Cell) -> dict[str, Any]:
        from megalong.dry_run.step import dry_run  # imports torch

        ranks = RANKS.get(cell.shape, 1)
        config = configuration(
            self.plan.shapes[cell.shape]
            | RUNGS[cell.rung]
            | {"num_layers": cell.layers, "seq_length": cell.length, "global_batch_size": ranks}
            | ({"zero_stage": 3} if ranks > 1 else {}),
            ranks,
        )
        result = dry_run(config, self.plan.vocabulary, ranks=ranks, quick=True)
        flops: dict[str, dict[str, int]] = {}
        for (part, direction), count in result.flops.items():
            flops.setdefault(part, {})[direction] = count
        return {
            **vars(cell),
            "device": {kind: result.memory[kind] for kind in MEMORY},
            "host": result.host,
            "flops": flops,
        }


def configuration(values: dict[str, Any], ranks: int = 1) -> Config:
    """A resolved configuration of one micro batch of one sequence."""
    common = {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "precision": "bf16",
        "make_vocab_size_divisible_by": 1,
        "data_path": "unread",
        "tokenizer_type": "ByteTokenizer",
    }
    return config_from_values(common | values).resolve(ranks)


def extended(low: dict, high: dict, field: str, value: int) -> dict[str, Any]:
    """Bytes of a cell, linear in one of its fields, from two cells that differ in it."""
    share = (value - low[field]) / (high[field] - low[field])
    return {
        **low,
        field: value,
        "device": {
            k: low["device"][k] + share * (high["device"][k] - low["device"][k]) for k in MEMORY
        },
        "host": low["host"] + share * (high["host"] - low["host"]),
    }


def whole(cells: Cells, shape: str, rung: str, length: int) -> dict[str, Any]:
    """Bytes of a cell with all layers of its shape."""
    layers, (first, second, _) = cells.plan.shapes[shape]["num_layers"], cells.plan.lengths

    def of_all_layers(at: int) -> dict[str, Any]:
        pair = (cells[Cell(shape, rung, few, at)] for few in LAYERS)
        return extended(*pair, "layers", layers)

    if length in (first, second):
        return of_all_layers(length)
    # What the further layers take is linear in the tokens.
    few = [cells[Cell(shape, rung, LAYERS[0], at)] for at in (first, second)]
    line, line_of_few = (
        extended(*pair, "length", length)
        for pair in ([of_all_layers(first), of_all_layers(second)], few)
    )
    found = cells[Cell(shape, rung, LAYERS[0], length)]
    return {
        **line,
        "device": {
            k: found["device"][k] + line["device"][k] - line_of_few["device"][k] for k in MEMORY
        },
        "host": found["host"] + line["host"] - line_of_few["host"],
    }


def row(cells: Cells, shape: str, rung: str) -> dict[str, Any]:
    """A rung with all its layers: bytes a token at each length, FLOPs, the longest sequence."""
    lengths = cells.plan.lengths
    at = {length: whole(cells, shape, rung, length) for length in lengths}
    *_, before, last = at.values()
    slope = {
        kind: (last["device"][kind] - before["device"][kind]) / (lengths[-1] - lengths[-2])
        for kind in MEMORY
    }
    host = (last["host"] - before["host"]) / (lengths[-1] - lengths[-2])
    layers = cells.plan.shapes[shape]["num_layers"] / LAYERS[0]
    flops = cells[Cell(shape, rung, LAYERS[0], lengths[-1])]["flops"]
    return {
        "shape": shape,
        "rung": rung,
        "ranks": RANKS.get(shape, 1),
        "usable": cells.plan.usable,
        "at": {
            length: {"device": total(cell), **cell["device"], "host": cell["host"]}
            for length, cell in at.items()
        },
        "bytes_per_token": {"device": sum(slope.values()), **slope, "host": host},
        "flops_per_token": {
            part: {
                way: count / lengths[-1] * (1 if part == "logits" else layers)
                for way, count in ways.items()
            }
            for part, ways in flops.items()
        },
        "longest": longest(cells, shape, rung, before, last),
    }


def total(cell: dict[str, Any]) -> float:
    return sum(cell["device"].values())


def longest(cells: Cells, shape: str, rung: str, before: dict, last: dict) -> dict[str, Any]:
    """The longest sequence of all layers that fits, from the line through two lengths; and, of the
    rungs in `CONFIRMED`, one dry run, of few layers, at that length, beside what the line says of
    it. A shorter one, where it turns out not to fit."""
    plan = cells.plan
    slope = (total(last) - total(before)) / (last["length"] - before["length"])
    few = [cells[Cell(shape, rung, LAYERS[0], length)] for length in plan.lengths[-2:]]
    tokens = int(last["length"] + (plan.usable - total(last)) / slope) // plan.step * plan.step
    while tokens > 0:
        at_length = extended(before, last, "length", tokens)
        sequence = {"tokens": tokens, "device": total(at_length), "host": at_length["host"]}
        if rung not in CONFIRMED:
            return sequence
        expected = total(extended(*few, "length", tokens))
        found = total(cells[Cell(shape, rung, LAYERS[0], tokens)])
        sequence["device"] += found - expected
        if sequence["device"] <= plan.usable:
            return {**sequence, "error": found / expected - 1}
        excess = sequence["device"] - plan.usable
        tokens -= math.ceil(excess / slope / plan.step) * plan.step
    return {"tokens": 0}


def compare(rung: str, length: int) -> dict[str, Any]:
    """Make a real step and a dry one, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        deepspeed = Path(folder, "deepspeed.json")
        deepspeed.write_text(json.dumps(DEEPSPEED))
        values = SMALL | MEASURED[rung] | {"seq_length": length, "deepspeed_config": str(deepspeed)}
        real = in_process("real", values, SMALL_VOCABULARY, CPU_MEMORY)
        dry = in_process("dry", values, SMALL_VOCABULARY)
    measured = real["peak"] - real["before"]
    difference = measured / dry["peak"] - 1
    row = {"rung": rung, "length": length, "measured": measured, "dry": dry["peak"]}
    return {**row, "difference": difference, "seconds": real["seconds"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a table for each shape."""
    text = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        lengths = [f"{int(n):,}" for n in mine[0]["at"]]
        header = " | ".join(HEADER).format(*lengths, limit(mine[0]))
        ranks = mine[0]["ranks"]
        text += [f"### {shape}" + (f", ZeRO 3 over {ranks} ranks" if ranks > 1 else ""), ""]
        text += [f"| {header} |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
        base = next((flops(row) for row in mine if row["rung"] == BASE), None)
        text += [line(row, base) for row in mine] + [""]
    return "\n".join(text)


def limit(row: dict[str, Any]) -> str:
    """What the longest sequence may take of the device."""
    usable = row["usable"]
    return f"{usable / GIB:.0f} GiB" if usable >= GIB else f"{usable / 2**20:.0f} MiB"


def line(row: dict[str, Any], base: float | None) -> str:
    per_token, longest = row["bytes_per_token"], row["longest"]
    *_, last = row["at"].values()
    words = [row["rung"]]
    words += [f"{at['device'] / int(n):,.0f}" for n, at in row["at"].items()]
    words += [
        f"{per_token.get(k, 0):,.0f}" for k in ("device", "activations", "temporaries", "host")
    ]
    words.append(f"{sum(last[k] for k in MODEL) / GIB:.1f} GiB")
    words.append(f"{flops(row) / 1e6:,.0f}")
    words.append(f"{flops(row) / base:.2f}" if base else "")
    words.append(f"{longest['tokens']:,}")
    if longest["tokens"]:
        words.append(f"{longest['host'] / GIB:,.0f} GiB")
        words.append(f"{longest['error']:+.1%}" if "error" in longest else "not run")
    else:
        words += ["", ""]
    return f"| {' | '.join(words)} |"


def flops(row: dict[str, Any]) -> float:
    """Of all parts, forward and backward."""
    return sum(sum(ways.values()) for ways in row["flops_per_token"].values())


def measured_table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: measured beside dry."""
    text = ["| rung | tokens | measured | dry run | difference |", "|---|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: (row["rung"], row["length"])):
        mib = f"{row['measured'] / 2**20:,.0f} MiB | {row['dry'] / 2**20:,.0f} MiB"
        text.append(f"| {row['rung']} | {row['length']:,} | {mib} | {row['difference']:+.1%} |")
    return "\n".join(text) + "\n"


def plot_measured(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the peak by length, measured and dry."""
    figure, (axes,) = axes_of()
    for number, rung in enumerate(dict.fromkeys(row["rung"] for row in rows)):
        mine = [row for row in rows if row["rung"] == rung]
        lengths, color = [row["length"] for row in mine], f"C{number}"
        axes.plot(lengths, [row["dry"] / GIB for row in mine], "-", color=color, label=rung)
        axes.plot(lengths, [row["measured"] / GIB for row in mine], "o", color=color)
    axes.set(xlabel="tokens", ylabel="peak (GiB): dry run, and measured (points)")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=80)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot bytes per token of the device by rung, and the longest sequence, a colour a shape."""
    figure, (left, right) = axes_of(2, 8, 5)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["rung"] for row in rows))[::-1]
    for number, shape in enumerate(shapes):
        mine = [row for row in rows if row["shape"] == shape]
        places = [names.index(row["rung"]) + 0.2 * (1.5 - number) for row in mine]
        left.barh(places, [row["bytes_per_token"]["device"] / 1e3 for row in mine], 0.2)
        tokens = [max(row["longest"]["tokens"], 1) for row in mine]
        right.barh(places, tokens, 0.2, label=shape)
    left.set(xlabel="kB a token of the device at the peak", xscale="log")
    left.set_yticks(range(len(names)), names)
    right.set(xlabel=f"longest sequence in {limit(rows[0])} (tokens)", xscale="log", yticks=[])
    right.legend()
    figure.savefig(path, dpi=80)


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

    option = add(ladder)
    option("--tiny", action="store_true", help="a model of seconds")
    option("--shapes", nargs="+", help=f"of the models: {', '.join(PLAN.shapes)} (default: all)")
    option("--rungs", nargs="+", help=f"of the ladder: {listed(RUNGS)} (default: all)")
    option = add(measured)
    option("--lengths", type=int, nargs="+", default=[16_384, 65_536, 262_144], help="tokens")
    option("--rungs", nargs="+", help=f"what is switched on: {listed(MEASURED)} (default: both)")
    arguments = parser.parse_args()
    known: Collection[str] = MEASURED
    if arguments.command is ladder:
        known = RUNGS
        arguments.plan = TINY if arguments.tiny else PLAN
        require_known("--shapes", arguments.shapes, arguments.plan.shapes)
    require_known("--rungs", arguments.rungs, known)
    return arguments


def listed(names: Iterable[str]) -> str:
    """Names with spaces in them."""
    return ", ".join(f'"{name}"' for name in names)


def require_known(flag: str, given: list[str] | None, known: Collection[str]) -> None:
    """Raise UserError for a name that is none of those known."""
    for name in given or []:
        if name not in known:
            raise UserError(
                f"{flag} {name}: choose from {listed(known)}{did_you_mean(name, known)}"
            )


def ladder(arguments: Namespace) -> None:
    from megalong.dry_run import fake_device

    fake_device.load()
    import torch  # noqa: F401

    fake_device.pretend()
    plan, folder = arguments.plan, arguments.output / "cells"
    shapes, rungs = arguments.shapes or plan.shapes, arguments.rungs or RUNGS
    pairs = [(shape, rung) for shape in shapes for rung in rungs]
    planned = list(chain.from_iterable(plan.cells(*pair) for pair in pairs))
    missing = sum(not (folder / cell.file).exists() for cell in planned)
    missing += sum(rung in CONFIRMED for _, rung in pairs)
    with progress_bar(missing, "run", "dry runs") as bar:
        cells = Cells(folder, plan, done=bar.update)
        rows = [row(cells, *pair) for pair in pairs]
    report(arguments.output / "ladder", rows, table(rows), plot)


def measured(arguments: Namespace) -> int:
    path = arguments.output / "measured.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    known = {(row["rung"], row["length"]) for row in rows}
    wanted = [(rung, n) for n in sorted(arguments.lengths) for rung in arguments.rungs or MEASURED]
    missing = [pair for pair in wanted if pair not in known]
    with progress_bar(len(missing), "pair", "real and dry steps") as bar:
        for rung, length in missing:
            rows.append(compare(rung, length))
            write(path, rows)
            bar.update()
    report(arguments.output / "measured", rows, measured_table(rows), plot_measured)
    return int(any(abs(row["difference"]) > BOUND for row in rows))


def report(name: Path, rows: list[dict], text: str, plot_rows: Callable) -> None:
    """Write NAME.json, NAME.md and NAME.png, and print the table."""
    write(name.with_suffix(".json"), rows)
    name.with_suffix(".md").write_text(text)
    print(text)
    plot_rows(rows, name.with_suffix(".png"))


if __name__ == "__main__":
    run(main)
