"""The run folder: opened by one run at a time, and never taken over by another by accident.

flags.yaml     what was given on the command line, and the defaults; --config starts a like run
config.yaml    the resolved configuration: what ran, of the last stage that did
stopped        there while the run waits to be started again: it was asked to stop, and did
metrics.jsonl, tensorboard/: see metrics.py; profile/: see profiling.py; the checkpoints: see
megalong/checkpoint
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from megalong.checkpoint.folder import has_pointer
from megalong.config import Config
from megalong.config.arguments import to_yaml
from megalong.utils.errors import UserError, system_errors_of
from megalong.utils.files import writable_folder


def prepare_run_folder(config: Config) -> None:
    """Make the folders of `--save` and `--tensorboard-dir`.

    Raises UserError where one cannot be made or written to, or where `--save` holds a run that this
    one would overwrite because `--load` does not name it.
    """
    run = config.run
    for flag, folder in (("--save", run.save), ("--tensorboard-dir", run.tensorboard_dir)):
        if folder is not None:
            writable_folder(flag, Path(folder))
    if run.save is None or same_folder(run.load, run.save):
        return
    folder = Path(run.save)
    if has_pointer(folder) or (folder / "metrics.jsonl").exists():
        go_on = f"--load {run.save} to go on with it"
        if run.finetune:
            go_on += f", with --pretrained-checkpoint {run.load} in the place of --finetune"
        raise UserError(f"--save {run.save} holds another run already: {go_on}, or save elsewhere")


def same_folder(one: str | None, other: str | None) -> bool:
    """Whether two paths are given and name one folder."""
    return one is not None and other is not None and Path(one).resolve() == Path(other).resolve()


def open_run_folder(config: Config, flags: str) -> IO[str] | None:
    """Take the folder of `--save` and write down the configuration; by the main process only.

    flags: the YAML text that starts a like run.
    Returns the locked file, to be kept open as long as the run lasts (a killed process lets go of
    it). Raises UserError while another run holds the folder.
    """
    if config.run.save is None:
        return None
    folder = Path(config.run.save)
    with system_errors_of("--save", folder):
        lock = (folder / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"--save {folder}: another run is writing there") from None
        except OSError:
            pass  # some network file systems have no locks
        (folder / "flags.yaml").write_text(flags)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "stopped").unlink(missing_ok=True)
    return lock


def leave_unfinished(config: Config, why: str) -> None:
    """Leave the file `stopped`, by which a job script knows that the run is to be started again."""
    with system_errors_of("--save", config.run.save):
        (Path(config.run.save) / "stopped").write_text(why + "\n")
