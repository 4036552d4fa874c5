"""A run on Weights & Biases, where `--wandb-project` asks for it."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megalong.config import Config
from megalong.utils.errors import UserError, system_errors_of

RUN_ID = "wandb_run_id"  # file in the run folder: a run that goes on is the same one there


def check_wandb(config: Config) -> None:
    """Raise UserError where `--wandb-project` is given and the package is not there, on the rank
    that the curves are drawn by."""
    project = config.run.wandb_project
    if os.environ.get("RANK", "0") != "0":
        return
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--wandb-project {project} needs the package wandb: pip install wandb, or leave the"
            " flag out"
        )


class WandbBoard:
    """Curves on Weights & Biases, by iteration. A service that fails later ends no training.

    say: called with a line to be said.
    Raises UserError where the service cannot be had: no key, no such project.
    """

    def __init__(self, config: Config, say: Callable[[str], None]):
        import wandb

        run = config.run
        self._say, self._failed = say, False
        known = None if run.save is None else _read_id(run.save)
        try:
            self._run = wandb.init(
                project=run.wandb_project,
                name=run.wandb_exp_name,
                dir=run.save,
                id=known,
                resume="allow",
                config=dataclasses.asdict(config),
            )
            # Its own count of steps only grows; a resumed run goes back to its checkpoint's
            # iteration.
            self._run.define_metric("iteration")
            self._run.define_metric("*", step_metric="iteration")
        except Exception as error:
            raise UserError(f"--wandb-project {run.wandb_project}: {error}") from error
        if run.save is not None:
            _write_id(run.save, self._run.id)

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
        """wandb writes to its own file on the disk at once."""

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


def _read_id(folder: str) -> str | None:
    """The id that the run in this folder has there; None where it has none yet."""
    file = Path(folder) / RUN_ID
    with system_errors_of("--save", folder):
        return file.read_text().strip() or None if file.exists() else None


def _write_id(folder: str, run_id: str) -> None:
    aside = Path(folder) / f"{RUN_ID}.tmp"
    with system_errors_of("--save", folder):
        aside.write_text(run_id)
        os.replace(aside, Path(folder) / RUN_ID)
