"""What a dry run and the cost model predict, against launches on this machine's CPU.

    python tools/benchmarks/predicted.py exact --output runs/predicted
    python tools/calibrate_device.py --ranks 2 --output runs/predicted/cluster.yaml
    python tools/benchmarks/predicted.py ranking --cluster runs/predicted/cluster.yaml \
        --output runs/predicted

exact     Launches of 1, 2, 4 and 8 ranks, every rank beside its own dry run: collectives, calls and
          bytes of each by axis, and FLOPs by part and direction, which have to be equal; and memory
          at the peak, which may differ by 5%. Half an hour on two cores.
ranking   Launches of 2 ranks with a core each, which take turns: median time of a step beside the
          predicted one, and the rank correlation of the two (Spearman's), which has to be 0.8. Ten
          minutes on two cores, six of which nothing else may run in.

Each goes on where it was stopped, writes JSON and a table (Markdown) into --output, ranking a plot
as well, and ends with status 1 where a bound is broken.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from predicted_cases import EXACT, RANKING, Case

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, did_you_mean


def main() -> int:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments.command(arguments)


def parse_arguments() -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(required=True)
    for command, cases in ((exact, EXACT), (ranking, RANKING)):
        sub = commands.add_parser(command.__name__, description=__doc__)
        sub.set_defaults(command=command, known=cases)
        sub.add_argument("--output", type=Path, required=True, help="folder for the results")
        sub.add_argument("--cases", nargs="+", help="which, by name (default: all)")
        if command is ranking:
            sub.add_argument("--cluster", required=True, help="description of this machine")
    arguments = parser.parse_args()
    for name in arguments.cases or []:
        if name not in arguments.known:
            known = ", ".join(f'"{known}"' for known in arguments.known)
            hint = did_you_mean(name, arguments.known)
            raise UserError(f"--cases {name}: choose from {known}{hint}")
    return arguments


def exact(arguments: Namespace) -> int:
    import predicted_report as report

    folders = prepared(arguments)
    for ranks in sorted({case.ranks for case in EXACT.values()}):
        mine = {name: folder for name, folder in folders.items() if EXACT[name].ranks == ranks}
        run_missing("dry", ranks, list(mine.values()))
        run_missing("real", ranks, list(mine.values()))
    rows = [exact_row(name, EXACT[name], folder) for name, folder in folders.items()]
    write(arguments.output / "exact.json", rows)
    text = report.exact_table(rows)
    (arguments.output / "exact.md").write_text(text)
    print(text)
    return int(not all(report.holds(rank) for row in rows for rank in row["ranks"]))


def ranking(arguments: Namespace) -> int:
    import predicted_report as report
    from predicted_times import predicted_seconds

    folders = prepared(arguments)
    run_missing("dry", 2, list(folders.values()))
    run_missing("timed", 2, list(folders.values()))
    rows = []
    for name, folder in folders.items():
        seconds = json.loads((folder / "timed-0.json").read_text())
        cost = predicted_seconds(folder, arguments.cluster)
        rows.append({"name": name, **flags_of(RANKING[name]), "measured": seconds, **cost})
    result = {"correlation": report.correlation(rows), "rows": rows}
    write(arguments.output / "ranking.json", result)
    text = report.ranking_table(result)
    (arguments.output / "ranking.md").write_text(text)
    print(text)
    report.plot(result, arguments.output / "ranking.png")
    return int(result["correlation"] < report.CORRELATION)


def prepared(arguments: Namespace) -> dict[str, Path]:
    """Folders of the cases, by name."""
    folders = {}
    for name in arguments.cases or arguments.known:
        slug = "".join(c if c.isalnum() else "_" for c in name)
        folder = arguments.output / "cases" / arguments.command.__name__ / slug
        folder.mkdir(parents=True, exist_ok=True)
        arguments.known[name].write(folder)
        folders[name] = folder
    return folders


def run_missing(kind: str, ranks: int, folders: list[Path]) -> None:
    """Launch those that this kind has not written a result of."""
    from predicted_ranks import launch

    last = 0 if kind == "timed" else ranks - 1
    missing = [folder for folder in folders if not (folder / f"{kind}-{last}.json").exists()]
    if missing:
        print(f"{len(missing)} {kind} launches of {ranks} ranks", file=sys.stderr, flush=True)
        launch(kind, ranks, missing)


def exact_row(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """Of each rank what was measured and what the dry run says."""
    ranks = []
    for rank in range(case.ranks):
        real, dry = (
            json.loads((folder / f"{kind}-{rank}.json").read_text()) for kind in ("real", "dry")
        )
        ranks.append({"rank": rank, "real": real, "dry": dry})
    return {"name": name, **flags_of(case), "ranks": ranks}


def flags_of(case: Case) -> dict[str, Any]:
    return {"launched": case.ranks, "flags": case.flags}


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
