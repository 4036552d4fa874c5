"""What dilated attention is worth: an experiment by one command.

    examples/experiments/corpus.sh cpu runs/corpus
    python examples/experiments/run.py perplexity --scale cpu --corpus runs/corpus \\
        --output runs/experiments
    python examples/experiments/run.py perplexity --scale cpu --output runs/experiments --report

The experiments are the grids beside this file. A grid's cells are a training and its evaluation
each; each that ends leaves OUTPUT/EXPERIMENT_SCALE/cells/CELL.json, and is not run again. Killed,
the same command goes on with the rest, and with trainings that were under way from their last
checkpoints. --plan only says what there is to do. In the end, and with --report of what there is,
OUTPUT/EXPERIMENT_SCALE has cells.csv, made of those files, and report.md and a plot, made of
cells.csv alone. A cell that takes longer than its minutes is cut and left out of the means; a
larger --minutes lets it go on. --check-seed runs chosen cells with a seed that the grid has not,
and says in another_seed.md whether they lie where the others would have them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, needed_packages
from megalong.utils.command_line import run as run_main

with needed_packages():
    from commands import OutOfTime, Place, Training, evaluate, evaluation_command
    from cost import cost_of
    from grid import Cell, Grid, read_grid
    from machine import machine, processors
    from report import check_others, write_check, write_report
    from table import table_of

from megalong.utils.errors import UserError, counted, did_you_mean
from megalong.utils.progress import clock, progress_bar

ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # where there is a GPU, too
JOBS = {"cpu": 2}  # cells at a time, of a scale; else one
TICK = 0.2  # seconds between two looks at the cells that run
GRIDS = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("experiment", help=f"{', '.join(GRIDS)}, or a grid of your own: a .yaml file")
    add("--output", type=Path, required=True, help="folder for models, cells and reports")
    add("--scale", default="cpu", help="cpu: two cores, minutes a cell; gpu: one H100")
    add("--corpus", type=Path, help="folder that corpus.sh made, for experiments on text")
    add("--cells", nargs="+", help='those of these values: "dense 512" "dilated 512"')
    add("--seeds", type=int, nargs="+", help="instead of the grid's")
    add("--check-seed", type=int, help="run --cells with a new seed, beside the report's")
    add("--minutes", type=float, help="bound of a cell (default: the grid's)")
    add("--processes", type=int, default=1, help="of a training; more than one by torchrun")
    add("--jobs", type=int, help="cells at a time, between which a CPU's cores are divided")
    add("--plan", action="store_true", help="say what there is to do, and do nothing")
    add("--report", action="store_true", help="make the report of what there is, and no more")
    args = parser.parse_args()
    if args.experiment not in GRIDS and not args.experiment.endswith(".yaml"):
        hint = did_you_mean(args.experiment, GRIDS)
        raise UserError(
            f"{args.experiment}: no such experiment{hint}; there are {', '.join(GRIDS)}"
        )
    if args.seeds is not None:
        args.seeds = list(dict.fromkeys(args.seeds))
    if args.jobs is None:
        args.jobs = JOBS.get(args.scale, 1)
    for name in ("processes", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if args.minutes is not None and args.minutes <= 0:
        raise UserError("--minutes must be above 0")
    if args.check_seed is not None and args.seeds is not None:
        raise UserError("--check-seed is the only seed of its cells: leave --seeds out")
    return args


def main() -> None:
    args = parse_arguments()
    path, checked = GRIDS.get(args.experiment, Path(args.experiment)), args.check_seed
    seeds = args.seeds if checked is None else [checked]
    grid = read_grid(path, args.scale, seeds)
    folder = args.output / f"{grid.experiment}_{grid.scale}"
    failed: list[str] = []
    if not args.report:
        cells = grid.chosen(args.cells) if args.cells else grid.cells
        place = place_of(cells, grid, args)
        if checked is not None:
            corpus = place.corpus_digest
            check_others(folder, [cell.values for cell in cells], checked, corpus)
        into = folder / ("cells" if checked is None else "another_seed")
        failed = run_cells(cells, grid, args, place, into)
        if args.plan:
            return
    if checked is not None and not failed:
        print(write_check(folder, grid, checked))
    elif checked is None and table_of(folder):
        write_report(folder, grid)
        print((folder / "report.md").read_text())
        print(f"{folder}: report.md, cells.csv and a plot")
    elif not failed:
        raise UserError(f"{folder}: no cell has been run: leave --report out")
    if failed:
        raise UserError(f"{counted(len(failed), 'cell')} failed: {', '.join(failed)}, see above")


def place_of(cells: list[Cell], grid: Grid, args: argparse.Namespace) -> Place:
    """Raises UserError where the corpus that they need is not there."""
    minutes = grid.minutes if args.minutes is None else args.minutes
    models = (args.output / "models").resolve()
    corpus = None
    if any(cell.needs_corpus for cell in cells):
        corpus = checked_corpus(args.corpus)
    environment = {}
    if grid.scale == "cpu":
        threads = max(processors() // (args.jobs * args.processes), 1)
        environment = {**ON_THE_CPU, "OMP_NUM_THREADS": str(threads)}
    return Place(corpus, models, args.processes, 60 * minutes, environment)


def run_cells(
    cells: list[Cell], grid: Grid, args: argparse.Namespace, place: Place, folder: Path
) -> list[str]:
    """Runs those that have not been. Returns the names of those that failed."""
    minutes = place.seconds / 60
    trainings = {cell.name: training_of(cell, grid.equal, place) for cell in cells}
    for training in trainings.values():
        evaluation_command(training, folder)  # refuses misspelt flags before anything is trained
    left = [
        cell
        for cell in cells
        if not is_done(folder / f"{cell.name}.json", trainings[cell.name].settings, minutes)
    ]
    ahead = {
        start.folder
        for cell in left
        for start in trainings[cell.name].all_of_them[:-1]
        if not start.done
    }
    most = clock(60 * minutes * (len(left) + len(ahead)))
    print(
        f"{grid.experiment}: {counted(len(cells), 'cell')}, {len(left)} to be run, and"
        f" {counted(len(ahead), 'training')} that they start from, at most {minutes:g} minutes"
        f" each: {most} at the most, added up; {args.jobs} at a time",
        flush=True,
    )
    if args.plan:
        print_plan([trainings[cell.name] for cell in cells], left)
        return []
    if not left:
        return []
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    folder.mkdir(parents=True, exist_ok=True)
    gflops = {
        training.folder: training.cost.total_flops // 10**9
        for cell in left
        for training in trainings[cell.name].all_of_them
    }
    shares = dict.fromkeys(gflops, 0.0)
    for cell in left:  # those that are done already are no work of now
        shares |= {each.folder: 1.0 for each in trainings[cell.name].all_of_them if each.done}
    failed: list[str] = []
    work = [run_cell(trainings[cell.name], grid, folder, shares, failed) for cell in left]
    with (
        progress_bar(sum(gflops.values()), "GFLOP", grid.experiment, interval=30) as bar,
        contextlib.closing(run_together(work, args.jobs)) as running,
    ):
        bar.n = bar.initial = sum(gflops[folder] for folder, share in shares.items() if share)
        for ended in running:
            done = round(sum(share * gflops[training] for training, share in shares.items()))
            bar.set_description(f"{grid.experiment} {ended}/{len(left)}", refresh=False)
            bar.update(done - bar.n)
    return failed


def print_plan(trainings: list[Training], left: list[Cell]) -> None:
    for training in trainings:
        cell, cost = training.cell, training.cost
        state = "to be run" if cell in left else "done"
        print(
            f"{cell.name}: {cost.iterations:,} iterations, {cost.tokens:,} tokens,"
            f" {cost.total_flops / 1e12:,.2f} TFLOP, {cost.parameters:,} parameters; {state}"
        )
    starts = {
        start.folder: start.cost.total_flops
        for training in trainings
        if training.cell in left
        for start in training.all_of_them[:-1]
    }
    each = {training.folder: training.cost.total_flops for training in trainings}
    print(f"{counted(len(each), 'training')} in all, {sum(each.values()) / 1e12:,.2f} TFLOP")
    if starts:
        tflops = sum(starts.values()) / 1e12
        print(
            f"those to be run start from {counted(len(starts), 'training')}, {tflops:,.2f} TFLOP in"
            " all, done or not"
        )


def run_together(work: list[Generator], jobs: int) -> Iterator[int]:
    """Have these run to their ends, so many at a time. Yields now and then how many have ended."""
    waiting, running = deque(work), []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(waiting.popleft())
            running = [each for each in running if goes_on(each)]
            yield len(work) - len(waiting) - len(running)
            time.sleep(TICK)
    finally:
        for each in running:
            each.close()


def goes_on(work: Generator) -> bool:
    """Have it go on a little; whether it has not ended."""
    return next(work, work) is not work


def run_cell(
    training: Training,
    grid: Grid,
    folder: Path,
    shares: dict[Path, float],
    failed: list[str],
) -> Generator[None]:
    """Runs a cell and writes its file; one that fails is told, and not written."""
    try:
        result = yield from result_of(training, grid, folder, shares)
    except UserError as error:
        print(f"{training.cell.name}: {error}", file=sys.stderr, flush=True)
        failed.append(training.cell.name)
        return
    path = folder / f"{training.cell.name}.json"
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(unfinished, path)


def result_of(
    training: Training, grid: Grid, folder: Path, shares: dict[Path, float]
) -> Generator[None, None, dict]:
    """A cell's result, as it is written."""
    cell, cost, place = training.cell, training.cost, training.place
    seconds, found = 0.0, None
    commands: list[list[str]] = []
    try:
        yield from training.go_on(shares)
        found, command, seconds = yield from evaluate(training, folder / cell.name)
        commands = [command]
    except OutOfTime as over:
        took = clock(training.seconds)
        print(
            f"{cell.name}: {over} was cut, the training is at {took}", file=sys.stderr, flush=True
        )
    curve = training.curve()
    return {
        "experiment": grid.experiment,
        "scale": grid.scale,
        "title": grid.title,
        "question": grid.question,
        "measure": grid.measure,
        "equal": grid.equal,
        "axes": grid.axes,
        "cell": cell.name,
        "values": cell.values,
        "seed": cell.seed,
        "settings": training.settings,
        "complete": found is not None,
        "minutes": place.seconds / 60,
        "seq_length": cost.seq_length,
        "flags": cell.flags,
        "stages": list(cell.stages),
        "data": cell.data,
        "corpus": place.corpus_digest if cell.needs_corpus else None,
        "evaluate": cell.evaluate,
        "commands": [place.words(command) for command in trained_by(training) + commands],
        "iterations": cost.iterations,
        "iterations_done": curve[-1][0] if curve else 0,
        "tokens": cost.tokens,
        "flops": cost.flops,
        "parameters": cost.parameters,
        "starts": starts_of(training),
        "loss_curve": curve,
        "evaluation": found,
        "seconds": {"training": round(training.seconds, 1), "evaluation": round(seconds, 1)},
        "processes": place.processes,
        "threads": place.environment.get("OMP_NUM_THREADS"),
        "trained_by_commits": commits_of(training),
        **machine(gpu=grid.scale != "cpu"),
    }


def training_of(cell: Cell, equal: str, place: Place) -> Training:
    """With what it starts from. equal: what the cell's budget is of."""
    start = training_of(cell.start, "tokens", place) if cell.start is not None else None
    cost = cost_of(cell, equal, vocabulary(cell, place.corpus), place.processes)
    return Training(cell, cost, place, start)


def commits_of(training: Training) -> list[str | None]:
    """Of the code that has trained it, and what it starts from."""
    found = [commit for each in training.all_of_them for commit in each.commits]
    return list(dict.fromkeys(found))


def trained_by(training: Training) -> list[list[str]]:
    """The commands, from the first one that it starts from."""
    return [command for each in training.all_of_them for command in each.commands]


def starts_of(training: Training) -> list[dict]:
    """What a report has of the trainings before this one, the first one first."""
    return [
        {
            "settings": start.settings,
            "flags": start.cell.flags,
            "stages": list(start.cell.stages),
            "data": start.cell.data,
            "seq_length": start.cost.seq_length,
            "attention": start.cost.attention,
            "tokens": start.cost.tokens,
            "flops": start.cost.flops,
            "seconds": round(start.seconds, 1),
        }
        for start in training.all_of_them[:-1]
    ]


def is_done(path: Path, settings: str, minutes: float) -> bool:
    """Whether a cell with these settings has been run: to its end, or as long as it may."""
    if not path.exists():
        return False
    result = json.loads(path.read_text())
    ran = result["complete"] or result["minutes"] >= minutes
    return ran and result["settings"] == settings


def checked_corpus(folder: Path | None) -> Path:
    if folder is None:
        raise UserError("--corpus is missing: the folder that examples/experiments/corpus.sh made")
    for name in ("corpus.json", "tokenizer.model", "train_text_document.idx", "held_out.jsonl"):
        if not (folder / name).exists():
            raise UserError(f"--corpus {folder}: no {name}: make it with corpus.sh")
    try:
        documents = sum(
            json.loads((folder / "corpus.json").read_text())["held_out"]["documents"].values()
        )
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'corpus.json'}: is not what corpus.sh writes: {error}"
        ) from error
    with (folder / "held_out.jsonl").open("rb") as file:
        lines = sum(1 for _ in file)
    if lines != documents:
        raise UserError(
            f"{folder / 'held_out.jsonl'}: has {counted(lines, 'document')}, and corpus.json says"
            f" {documents}: make the corpus anew with corpus.sh"
        )
    return folder.resolve()


def vocabulary(cell: Cell, corpus: Path | None) -> int:
    """Ids of a cell's tokenizer."""
    from megalong.data.tokenizers.tokenizer import build_tokenizer

    kind = cell.flags.get("tokenizer_type", "SentencePieceTokenizer")
    model = str(corpus / "tokenizer.model") if cell.needs_corpus else None
    return build_tokenizer(kind, model).vocab_size


if __name__ == "__main__":
    run_main(main)
