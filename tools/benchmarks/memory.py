"""Memory of a training step by token, from dry runs on a GPU that is not there.

Subcommands:
    ladder    bytes per token at the peak, by kind and with each feature on and off, FLOPs executed,
              and the longest sequence on a device of 80 GB, for models of 125M to 7B parameters;
              dry runs, a quarter of an hour on one core. Goes on where it was stopped.

    python tools/benchmarks/memory.py ladder --output runs/memory

Writes JSON, a table (Markdown) and a plot into --output.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from megalong.command_line import ArgumentParser, run


def main() -> int | None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments.command(arguments)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (ladder,):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        command.set_defaults(command=function)
        command.add_argument("--output", type=Path, required=True, help="folder for the results")
        command.add_argument("--tiny", action="store_true", help="a model of seconds")
        command.add_argument("--shapes", nargs="+", help="of the models (default: all)")
        command.add_argument("--rungs", nargs="+", help="of the ladder (default: all)")
    return parser.parse_args()


def ladder(arguments: Namespace) -> None:
    """Bytes per token at the peak, FLOPs and the longest sequence, from dry runs."""
    from megalong.planning import fake_device

    fake_device.load()
    import torch  # noqa: F401

    fake_device.pretend()
    import memory_ladder as dry
    import memory_report as report

    from megalong.progress import progress_bar

    plan = dry.TINY if arguments.tiny else dry.PLAN
    pairs = [
        (shape, rung)
        for shape in arguments.shapes or plan.shapes
        for rung in arguments.rungs or dry.RUNGS
        if rung not in dry.SAME
    ]
    folder = arguments.output / "cells"
    planned = list(chain.from_iterable(plan.cells(*pair) for pair in pairs))
    missing = sum(not (folder / cell.file).exists() for cell in planned) + len(pairs)
    with progress_bar(missing, "run", "dry runs") as bar:
        cells = dry.Cells(folder, plan, done=bar.update)
        rows = [dry.row(cells, *pair) for pair in pairs]
    (arguments.output / "ladder.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = report.table(rows)
    (arguments.output / "ladder.md").write_text(text)
    print(text)
    report.plot(rows, arguments.output / "ladder.png")


if __name__ == "__main__":
    run(main)
