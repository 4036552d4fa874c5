"""A run from its checkpoint to its end, stage after stage."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megalong.checkpoint.folder import checkpoint_folder
from megalong.config.stages import Stage
from megalong.model.build import check_backend
from megalong.parallel import build_mesh, process_group, temporary_mesh, watch_ranks
from megalong.parallel.mesh import Mesh
from megalong.training.deepspeed_config import deepspeed_config
from megalong.training.loop import Trainer
from megalong.training.resuming import starting_point
from megalong.training.run_blend import make_orders
from megalong.training.run_data import RunData, open_run_data
from megalong.training.stopping import Stopped, StopRequest


@dataclasses.dataclass(frozen=True)
class Beginning:
    """All that has to be there before a stage is trained: what it reads, and the checkpoint that it
    goes on from, or None."""

    stage: Stage
    data: RunData
    checkpoint: Path | None

    @classmethod
    def of(cls, stage: Stage, data: RunData) -> Beginning:
        """That of the stage with which this start of a run begins. Raises UserError."""
        config, checkpoint = starting_point(stage.config, stage)
        make_orders(data.train, checkpoint, config)
        return cls(dataclasses.replace(stage, config=config), data, checkpoint)

    @classmethod
    def after(cls, before: Beginning, stage: Stage, saved: bool) -> Beginning:
        """That of the next stage. saved: whether the one before has left a checkpoint in the run's
        folder; else there was nothing to train any more, and its own is gone on from."""
        run, checkpoint = before.stage.config.run, before.checkpoint
        stage = stage.following(run.save if saved else run.load)
        if saved:
            checkpoint = checkpoint_folder(Path(str(run.save)), stage.begin)
        data = open_run_data(stage.config)
        make_orders(data.train, checkpoint, stage.config)
        return cls(stage, data, checkpoint)


def checked_data(stage: Stage, world_size: int) -> RunData:
    """What a stage reads. Raises UserError where something of it is not there, or the stage cannot
    run on this machine: for all stages before the first one begins."""
    config = stage.config
    with stage.settings.errors():
        check_backend(config)
        deepspeed_config(config, config.parallel.data_parallel_size(world_size))
        return open_run_data(config)


def train_stages(
    beginning: Beginning, later: Sequence[Stage], request: Callable[[], StopRequest]
) -> None:
    """Join the processes of this launch, and train a stage and those after it, each as a run that
    goes on from the checkpoint that the one before has left, until one is asked to stop.

    request: makes what says whether that is so.
    """
    minutes = beginning.stage.config.run.distributed_timeout_minutes
    with process_group(minutes) as device, contextlib.ExitStack() as held:
        stop = None
        for following in [*later, None]:
            mesh_of = build_mesh if following is None else temporary_mesh
            config = beginning.stage.config
            with mesh_of(config, device) as mesh, watch_ranks(mesh, config.run):
                if stop is None:
                    stop = held.enter_context(request())
                done, saved = _train(beginning, mesh, stop, is_last=following is None)
            if not done or following is None:
                return
            if device.type == "cuda":
                torch.cuda.empty_cache()
            beginning = Beginning.after(beginning, following, saved)


def _train(beginning: Beginning, mesh: Mesh, stop: StopRequest, is_last: bool) -> tuple[bool, bool]:
    """Train one stage; whether it came to its end, and whether there is a checkpoint of that."""
    stage = beginning.stage
    try:
        trainer = Trainer(
            stage.config, stage.given, beginning.data, beginning.checkpoint, mesh, stop, stage
        )
    except Stopped:  # all is said
        return False, False
    done = trainer.train()
    if not is_last:
        trainer.engine.destroy()
    return done, trainer.saved_iteration is not None
