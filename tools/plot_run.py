"""Plot a run: the loss curve, the loss against the position in the context, accuracy on tasks.

    python tools/plot_run.py RUN [--output FOLDER]

reads RUN/metrics.jsonl and writes loss_curve.png, loss_by_position.png and, of a run with
--eval-tasks, task_accuracy.png (into RUN by default), over those that it made earlier.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError

TRAINING_COLOR, HELD_OUT_COLORS = "#4878a8", {"validation": "#c85a3c", "test": "#5a8f4e"}
OTHER_COLORS = ("#8e5ea2", "#c9a227", "#3aa6a6", "#a0522d", "#777777", "#d17ba6", "#2f4f8f")


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", type=Path, help="run folder, with metrics.jsonl")
    parser.add_argument("--output", type=Path, help="folder for the plots (default: the run's)")
    arguments = parser.parse_args()
    import yaml

    from megalong.training.metrics import read_metrics
    from megalong.utils.files import writable_folder

    metrics, resolved = arguments.run / "metrics.jsonl", arguments.run / "config.yaml"
    for file in (metrics, resolved):
        if not file.exists():
            raise UserError(f"{file}: no such file; a run with --save {arguments.run} writes it")
    records = read_metrics(metrics)
    if not records:
        raise UserError(f"{metrics}: no records yet")
    config = yaml.safe_load(resolved.read_text())
    output = arguments.output or arguments.run
    writable_folder("--output", output)
    curve, by_position = output / "loss_curve.png", output / "loss_by_position.png"
    plot_loss_curve(records, curve)
    print(f"{curve}: the loss of {len(records):,} records up to {records[-1]['iteration']:,}")
    if plot_loss_by_position(records, config, by_position):
        print(f"{by_position}: the last held-out loss by position")
    else:
        print(f"no {by_position.name}: the run has not been evaluated yet")
    tasks = [record for record in records if "task" in record]
    if tasks:
        plot_tasks(tasks, config, output / "task_accuracy.png")
        print(f"{output / 'task_accuracy.png'}: tasks by tokens seen, and by distance")


def plot_loss_curve(records: list[dict], path: Path) -> None:
    """Training loss against tokens seen, with the held-out losses as points."""
    from matplotlib.figure import Figure

    from megalong.training.metrics import training_records

    training = training_records(records)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        [r["consumed_tokens"] for r in training],
        [r["loss"] for r in training],
        color=TRAINING_COLOR, linewidth=1, label="training",
    )  # fmt: skip
    for name in dict.fromkeys(name for r in training for name in r.get("sources", {})):
        of_source = [(r["consumed_tokens"], r.get("sources", {}).get(name)) for r in training]
        points = [(x, its["loss"]) for x, its in of_source if its and its["loss"] is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, linewidth=0.6, alpha=0.7, label=f"training, {name}")
    for split, color in held_out_colors(records).items():
        held_out = [r for r in records if r.get("split") == split]
        x = [r["consumed_tokens"] for r in held_out]
        y = [r["loss"] for r in held_out]
        axes.plot(x, y, "o-", color=color, label=f"{split}, {y[-1]:.3f} at the end")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def held_out_colors(records: list[dict]) -> dict[str, str]:
    """The held-out sets, in the order in which they appear, each with a color."""
    splits = list(dict.fromkeys(r["split"] for r in records if "split" in r))
    others = [split for split in splits if split not in HELD_OUT_COLORS]
    colors = {s: OTHER_COLORS[n % len(OTHER_COLORS)] for n, s in enumerate(others)}
    return {split: HELD_OUT_COLORS.get(split) or colors[split] for split in splits}


def plot_loss_by_position(records: list[dict], config: dict, path: Path) -> bool:
    """The last held-out loss against the position in the context; falling means that the model
    uses what came long before. False where there is none to plot."""
    held_out = {r["split"]: r for r in records if "split" in r}  # the last of each split
    if not held_out:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes, colors = figure.subplots(), held_out_colors(records)
    for split, record in held_out.items():
        edges = [max(edge, 2) for edge in record["position_edges"]]  # zero has no logarithm
        axes.stairs(
            [float("nan") if loss is None else loss for loss in record["loss_by_position"]],
            edges, baseline=None, color=colors[split], linewidth=1.5,
            label=f"{split}, iteration {record['iteration']}, {record['tokens']:,} tokens",
        )  # fmt: skip
    draw_segment_lengths(axes, config, edges[-1])
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="position in the context (tokens; dotted: segment lengths)",
        ylabel="loss (nats per token)",
        title="Held-out loss against position",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    return True


def plot_tasks(records: list[dict], config: dict, path: Path) -> None:
    """Accuracy on each task against tokens seen, and of the last evaluation against distance."""
    from matplotlib.figure import Figure

    from megalong.evals.scores import plot_by_distance

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    seen, distances = figure.subplots(1, 2)
    curves = {}
    for record in records:
        curves.setdefault((record["task"], record["length"]), []).append(record)
    for (task, length), points in curves.items():
        x, y = zip(*((r["consumed_tokens"], r["accuracy"]) for r in points), strict=True)
        seen.plot(x, y, "o-", markersize=3, label=f"{task} of {length:,} tokens")
    seen.set(
        xlabel="tokens", ylabel="share of answers that are right", ylim=(-0.02, 1.02), title="Tasks"
    )
    seen.grid(alpha=0.3)
    seen.legend(fontsize="small")
    last = [points[-1] for points in curves.values()]
    plot_by_distance(distances, last)
    draw_segment_lengths(distances, config, max(record["length"] for record in last))
    figure.savefig(path, dpi=150)


def draw_segment_lengths(axes, config: dict, end: int) -> None:
    """Dotted lines at the segment lengths of dilated attention that are less than `end`."""
    if "dilated" in config["attention"]["attention"]:  # a list; earlier runs have a word
        for length in set(config["attention"]["segment_lengths"]):
            if length < end:
                axes.axvline(length, color="gray", linewidth=0.6, linestyle=":")


if __name__ == "__main__":
    run(main)
