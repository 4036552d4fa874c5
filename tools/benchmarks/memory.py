"""Memory of a training step by token, and what it costs: dry runs and real steps.

    python tools/benchmarks/memory.py ladder --output runs/memory

ladder    Dry runs on a GPU that is not there: bytes per token at the peak, by kind and with each
          feature on and off, FLOPs executed, and the longest sequence on a device of 80 GB, for
          models of 125M to 7B parameters. Half an hour on one core; goes on where it was stopped.
measured  Real steps of a small model on the CPU, each length in a process of its own: the peak of
          resident memory beside a dry run's. Ends with status 1 where they differ by more than 5%.
          Ten minutes on two cores; goes on where it was stopped.
time      Real steps on the CPU: everything on against full recomputation alone, taking turns, and
          the time per token by length. A quarter of an hour on two cores that do nothing else.

Each writes its JSON into --output, all but time a table (Markdown) and a plot as well.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Collection, Iterable
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, did_you_mean


def main() -> int | None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments.command(arguments)


def parse_arguments() -> Namespace:
    import memory_ladder
    import memory_measured

    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(required=True)

    def add(function):
        command = commands.add_parser(function.__name__, description=__doc__)
        command.set_defaults(command=function)
        command.add_argument("--output", type=Path, required=True, help="folder for the results")
        return command.add_argument

    option = add(ladder)
    option("--tiny", action="store_true", help="a model of seconds")
    shapes, rungs = memory_ladder.PLAN.shapes, memory_ladder.RUNGS
    option("--shapes", nargs="+", help=f"of the models: {', '.join(shapes)} (default: all)")
    option("--rungs", nargs="+", help=f"of the ladder: {listed(rungs)} (default: all)")
    option = add(measured)
    option("--lengths", type=int, nargs="+", default=[16_384, 65_536, 262_144], help="tokens")
    switched = f"what is switched on: {listed(memory_measured.RUNGS)}"
    option("--rungs", nargs="+", help=f"{switched} (default: all on, either recomputation)")
    option = add(time)
    option("--length", type=int, default=32_768, help="tokens of the steps that take turns")
    option("--repeats", type=int, default=5, help="steps of each")
    option("--lengths", type=int, nargs="+", default=[32_768, 131_072, 524_288], help="tokens")
    option("--rungs", nargs="+", help="whose time by length is measured, of those of measured")
    arguments = parser.parse_args()
    known = memory_measured.RUNGS
    if arguments.command is ladder:
        known = rungs
        arguments.plan = memory_ladder.TINY if arguments.tiny else memory_ladder.PLAN
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
    import memory_ladder as dry
    import memory_report as report

    from megalong.utils.progress import progress_bar

    plan = arguments.plan
    pairs = [
        (shape, rung)
        for shape in arguments.shapes or plan.shapes
        for rung in arguments.rungs or dry.RUNGS
    ]
    folder = arguments.output / "cells"
    planned = list(chain.from_iterable(plan.cells(*pair) for pair in pairs))
    missing = sum(not (folder / cell.file).exists() for cell in planned)
    missing += sum(rung in dry.CONFIRMED for _, rung in pairs)
    with progress_bar(missing, "run", "dry runs") as bar:
        cells = dry.Cells(folder, plan, done=bar.update)
        rows = [dry.row(cells, *pair) for pair in pairs]
    write(arguments.output / "ladder.json", rows)
    text = report.table(rows)
    (arguments.output / "ladder.md").write_text(text)
    print(text)
    report.plot(rows, arguments.output / "ladder.png")


def measured(arguments: Namespace) -> int:
    import memory_measured as real
    import memory_report as report

    from megalong.utils.progress import progress_bar

    path = arguments.output / "measured.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    known = {(row["rung"], row["length"]) for row in rows}
    wanted = [
        (rung, n) for n in sorted(arguments.lengths) for rung in arguments.rungs or real.MEASURED
    ]
    missing = [pair for pair in wanted if pair not in known]
    with progress_bar(len(missing), "pair", "real and dry steps") as bar:
        for rung, length in missing:
            rows.append(real.compare(rung, length))
            write(path, rows)
            bar.update()
    text = report.measured_table(rows)
    (arguments.output / "measured.md").write_text(text)
    print(text)
    report.plot_measured(rows, arguments.output / "measured.png")
    return int(any(abs(row["difference"]) > real.BOUND for row in rows))


def time(arguments: Namespace) -> None:
    import memory_measured as real

    result = real.take_turns(arguments.length, arguments.repeats)
    for rung, ratio in result["ratios"].items():
        print(f"{result['medians'][rung]:8.2f} s, {ratio:5.2f} x: {rung}", flush=True)
    rows = []
    rungs = arguments.rungs or real.MEASURED
    for row in real.by_length(arguments.lengths, rungs, arguments.repeats):
        line = "{length:>9,} tokens: {microseconds_per_token:.1f} us a token, {rung}"
        print(line.format(**row), flush=True)
        rows.append(row)
        write(arguments.output / "time.json", {"turns": result, "by_length": rows})


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
