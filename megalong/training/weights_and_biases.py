"""A run on Weights & Biases, where `--wandb-project` asks for it."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from megalong.config import Config
from megalong.errors import UserError

RUN_ID = "wandb_run_id"  # file in the run folder: a run that goes on is the same one there


def check_wandb(config: Config) -> None:
    """Raise UserError where `--wandb-project` is given and the package is not there."""
    project = config.run.wandb_project
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"--wandb-project {project} needs the package wandb: pip install wandb, or leave the"
            " flag out"
        )


class WandbBoard:
    """Curves on Weights & Biases, by iteration.

    Raises UserError where the service cannot be had: no key, no such project.
    """

    def __init__(self, config: Config):
        import wandb

        run = config.run
        file = None if run.save is None else Path(run.save) / RUN_ID
        try:
            self._run = wandb.init(
                project=run.wandb_project,
                name=run.wandb_exp_name,
                dir=run.save,
                id=file.read_text() if file is not None and file.exists() else None,
                resume="allow",
                config=dataclasses.asdict(config),
            )
        except Exception as error:
            raise UserError(f"--wandb-project {run.wandb_project}: {error}") from error
        if file is not None:
            file.write_text(self._run.id)
        # Its own count of steps only grows; a resumed run goes back to its checkpoint's iteration.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """A point of each of these curves."""
        self._run.log({"iteration": iteration, **values})

    def flush(self) -> None:
        """wandb writes to its own file on the disk at once."""

    def close(self, failed: bool) -> None:
        """The run ends; failed: by an error."""
        self._run.finish(exit_code=int(failed))
