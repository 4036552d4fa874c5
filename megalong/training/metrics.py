"""A run's numbers in metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megalong.config import Config
from megalong.model.flops import PARTS
from megalong.utils.errors import UserError, system_errors_of

TRAINING_CURVES = (
    "loss", "z_loss", "learning_rate", "grad_norm", "skipped_spikes", "tokens_per_second", "mfu",
    "mfu_dense_equivalent", "data_share", "peak_memory_bytes", "peak_reserved_bytes",
)  # fmt: skip
SOURCE_CURVES = ("loss", "share", "epochs")
SAVE_CURVES = ("save_seconds", "save_blocking_seconds")
HELD_OUT_CURVES = ("loss", "perplexity", "bits_per_byte")
TASK_CURVES = ("accuracy", "token_accuracy", "loss")


class MetricsLog:
    """Records in `metrics.jsonl` in the run folder, one JSON object a line, and their curves on the
    boards; the main process has one.

    Training records are means since the last one: iteration, consumed_samples, consumed_tokens,
    loss, learning_rate, grad_norm, tokens_per_second, and
        stage: of a run of several, its name (in evaluations and samples too);
        z_loss (--z-loss-coeff), of the last iteration; skipped_spikes (--skip-loss-spikes), in all;
        mfu, mfu_dense_equivalent: share of all ranks' peak FLOP/s that the model FLOPs of the
            executed attention are, and those of dense attention would be (`megalong.model.flops`);
        data_share: share of the time in which this process waited for data;
        peak_memory_bytes: of this process: on a GPU what its tensors took at most since the last
            record (and peak_reserved_bytes, what PyTorch had reserved), on a CPU the largest
            resident set since the start;
        sources, where there are several: by name the loss, the share of the samples of this blend,
            and the epochs since the run began;
        flops, once after a start: of a step by part, of its dense equivalent, and the peak;
        traffic, once after a start: of the main process in a step, by axis and collective.
    Evaluations have iteration, split ("validation", "test", or "validation/NAME"), consumed_tokens,
    loss, perplexity, bits_per_byte, tokens (predicted ones), position_edges, loss_by_position;
    those on tasks iteration, consumed_tokens, style, and `megalong.evals.scores.TaskScore`. One of
    the iteration at which a run goes on takes the place of the same one before.
    The first record after a save has save_seconds (until it was on the disk) and
    save_blocking_seconds (for which the training stood still).
    Samples are in `samples.jsonl`: iteration, consumed_tokens, the number of the prompt, prompt,
    text, tokens, and whether the model ended the document.
    """

    def __init__(self, config: Config, resumed_iteration: int, say: Callable[[str], None]):
        """say: called with a line to be said."""
        run = config.run
        self._resumed_iteration = resumed_iteration
        self._system_errors = partial(system_errors_of, "--save", str(run.save))
        self._file = self._samples = None
        self._boards: list[_TensorBoard | WandbBoard] = []
        if run.save is not None:
            path = Path(run.save) / "metrics.jsonl"
            self._samples = path.with_name("samples.jsonl")
            with self._system_errors():
                forget_after(path, resumed_iteration)
                forget_after(self._samples, resumed_iteration)
                self._file = path.open("a")
        if run.tensorboard_dir is not None:
            self._boards.append(_TensorBoard(run.tensorboard_dir, resumed_iteration))
        if run.wandb_project is not None:
            self._boards.append(WandbBoard(config, say))

    def training(self, record: dict[str, Any]) -> None:
        """Write one logged iteration."""
        self._write(record)
        self._draw(record, "train", TRAINING_CURVES + SAVE_CURVES)
        for name, its in record.get("sources", {}).items():
            self._draw(its | {"iteration": record["iteration"]}, f"source/{name}", SOURCE_CURVES)
        if "flops" in record:
            parts = {**record["flops"]["per_step"], "iteration": record["iteration"]}
            self._draw(parts, "flops", PARTS)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Write one evaluation, of a split or of a task at one length."""
        if self._file is not None and record["iteration"] == self._resumed_iteration:
            with self._system_errors():
                path = Path(self._file.name)
                earlier = (r for r in read_metrics(path) if not _same_evaluation(r, record))
                _replace(path, [*earlier, record])
                self._file.close()
                self._file = path.open("a")
        else:
            self._write(record)
        if "task" in record:
            self._draw(record, f"task/{record['task']}/{record['length']}", TASK_CURVES)
        else:
            self._draw(record, record["split"], HELD_OUT_CURVES)
        self._draw(record, "train", SAVE_CURVES)

    def sample(self, record: dict[str, Any]) -> None:
        """What the model made of one prompt."""
        path, iteration = self._samples, record["iteration"]
        if path is not None:
            with self._system_errors():
                if iteration == self._resumed_iteration and path.exists():
                    same = iteration, record["number"]
                    earlier = read_metrics(path)
                    _replace(path, [r for r in earlier if (r["iteration"], r["number"]) != same])
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
        for board in self._boards:
            board.text(iteration, f"sample/{record['number']}", record["prompt"] + record["text"])

    def make_durable(self) -> None:
        """Flush to the disk, so that what a checkpoint says was done is in the logs as well."""
        if self._file is not None:
            with self._system_errors():
                os.fsync(self._file.fileno())
        if self._samples is not None and self._samples.exists():
            with self._system_errors(), self._samples.open("a") as file:
                os.fsync(file.fileno())
        for board in self._boards:
            board.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        with self._system_errors(), contextlib.ExitStack() as closing:
            if self._file is not None:
                closing.callback(self._file.close)
            for board in self._boards:
                closing.callback(board.close, failed=kind is not None)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            with self._system_errors():
                self._file.write(json.dumps(record) + "\n")
                self._file.flush()

    def _draw(self, record: dict[str, Any], group: str, names: tuple[str, ...]) -> None:
        values = {f"{group}/{n}": record[n] for n in names if record.get(n) is not None}
        for board in self._boards if values else []:
            board.scalars(record["iteration"], values)


class _TensorBoard:
    def __init__(self, folder: str, resumed_iteration: int):
        from torch.utils.tensorboard import SummaryWriter

        self._system_errors = partial(system_errors_of, "--tensorboard-dir", folder)
        with self._system_errors():
            self._writer = SummaryWriter(folder, purge_step=resumed_iteration + 1)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        with self._system_errors():
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def text(self, iteration: int, name: str, text: str) -> None:
        with self._system_errors():  # a block of code, in Markdown
            self._writer.add_text(name, "\n".join(f"    {x}" for x in text.split("\n")), iteration)

    def flush(self) -> None:
        with self._system_errors():
            self._writer.flush()

    def close(self, failed: bool) -> None:
        with self._system_errors():
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; a last line cut short by a killed run is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def forget_after(path: Path, iteration: int) -> None:
    """Drop what a run resumed at `iteration` writes again, all that came after its checkpoint."""
    if path.exists():
        _replace(path, [r for r in read_metrics(path) if r["iteration"] <= iteration])


def _replace(path: Path, records: list[dict[str, Any]]) -> None:
    """In one step, so that a run killed here loses nothing."""
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(aside, path)


def _same_evaluation(one: dict[str, Any], other: dict[str, Any]) -> bool:
    kind, what = "split", ("iteration", "split", "tokens", "position_edges")
    if "task" in other:
        kind, what = "task", ("iteration", "task", "style", "length", "samples")
    return kind in one and all(one[name] == other[name] for name in what)


def training_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of logged iterations."""
    return [record for record in records if "split" not in record and "task" not in record]


RUN_ID = "wandb_run_id"  # file in the run folder: a run that goes on is the same one there


def check_wandb(config: Config) -> None:
    """Raise UserError on rank 0 where `--wandb-project` is given and the package is not there."""
    project = config.run.wandb_project
    if os.environ.get("RANK", "0") != "0":
        return
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--wandb-project {project} needs the package wandb: pip install wandb, or leave the"
            " flag out"
        )


class WandbBoard:
    """Curves on Weights & Biases, by iteration. Raises UserError where the service cannot be had;
    one that fails later ends no training."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        import wandb

        run = config.run
        self._say, self._failed = say, False
        id_file = None if run.save is None else Path(run.save) / RUN_ID
        with system_errors_of("--save", str(run.save)):
            known = id_file.read_text() if id_file is not None and id_file.exists() else ""
        try:
            self._run = wandb.init(
                project=run.wandb_project,
                name=run.wandb_exp_name,
                dir=run.save,
                id=known.strip() or None,
                resume="allow",
                config=dataclasses.asdict(config),
            )
            # Its own count of steps only grows; a resumed run goes back to its checkpoint's
            # iteration.
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        except Exception as error:
            raise UserError(f"--wandb-project {run.wandb_project}: {error}") from error
        if id_file is not None:
            with system_errors_of("--save", run.save):
                aside = id_file.with_suffix(".tmp")
                aside.write_text(self._run.id)
                os.replace(aside, id_file)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """A point of each of these curves."""
        with self._failure_said():
            self._run.log({"iteration": iteration, **values})

    def text(self, iteration: int, name: str, text: str) -> None:
        """A text, as it stands."""
        import wandb

        with self._failure_said():
            page = wandb.Html(f"<pre>{html.escape(text)}</pre>")
            self._run.log({"iteration": iteration, name: page})

    def flush(self) -> None:
        """Do nothing: wandb writes to its own file on the disk at once."""

    def close(self, failed: bool) -> None:
        """The run ends; failed: by an error."""
        with self._failure_said():
            self._run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _failure_said(self) -> Iterator[None]:
        """Inside, an error is said, the first time, and no more comes of it."""
        try:
            yield
        except Exception as error:
            if not self._failed:
                self._say(f"--wandb-project: curves are missing there: {error}")
            self._failed = True
