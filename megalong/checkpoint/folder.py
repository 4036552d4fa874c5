"""Checkpoints as folders of a run: names, the pointer, and how one comes and goes at one stroke.

Whatever carries its final name, `iter_<iteration>`, was complete when it got it. Whoever reads one
holds a lock on its manifest, so that a run that removes old checkpoints leaves that one alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from megalong.checkpoint.manifest import MANIFEST, no_manifest
from megalong.utils.errors import UserError
from megalong.utils.files import UNFINISHED, flush_to_disk

_POINTER, _BEST = "latest", "best"
_NAME = re.compile(r"iter_(\d{7,})")
_REMOVED, _DAMAGED = ".removed", ".damaged"


def checkpoint_folder(run: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration belongs."""
    return run / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int:
    """The iteration that a checkpoint's name tells."""
    return int(_NAME.fullmatch(checkpoint.name)[1])


def checkpoints(run: Path) -> list[Path]:
    """List all that carries a checkpoint's name, the oldest first."""
    found = [path for path in run.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=iteration_of)


def has_pointer(run: Path) -> bool:
    """Whether a run has put a checkpoint in force here, sound or not."""
    return (run / _POINTER).exists()


def latest(run: Path) -> Path | None:
    """The checkpoint that the pointer names, there or not; None where it names none."""
    name = (run / _POINTER).read_text(errors="replace").strip()
    return run / name if _NAME.fullmatch(name) else None


def best(run: Path) -> Path | None:
    """The checkpoint that the link `best` names, there or not; None where there is no link."""
    link = run / _BEST
    return run / os.readlink(link) if link.is_symlink() else None


def newest_first(run: Path) -> list[Path]:
    """The checkpoint in force and those before it; all, where the pointer names none."""
    pointed, found = latest(run), checkpoints(run)
    if pointed is None:
        return found[::-1]
    older = [c for c in found if iteration_of(c) < iteration_of(pointed)]
    return [pointed, *reversed(older)]


def is_checkpoint_or_run(path: Path) -> bool:
    """Whether `find_checkpoint` has something to find there."""
    return has_pointer(path) or (path / MANIFEST).exists()


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint in force of a run folder, or `path` itself. Raises UserError."""
    pointed = latest(path) if has_pointer(path) else None
    folder = pointed or (path.resolve() if path.is_symlink() else path)  # `best` is a link
    if (folder / MANIFEST).exists():
        return folder
    if pointed:
        raise UserError(f"{no_manifest(pointed)}, and the file `{_POINTER}` names it")
    what = f"is not a checkpoint, it has no {MANIFEST}" if path.exists() else "is not there"
    if path.is_dir() and not any(path.iterdir()):
        what = "is an empty folder"
    raise UserError(
        f"{path} {what}: give a run folder with a file `{_POINTER}`, or one of its iter_* folders"
    )


def aside(checkpoint: Path) -> Path:
    """The name under which a checkpoint is written until it is complete."""
    return checkpoint.with_name(checkpoint.name + UNFINISHED)


def publish(checkpoint: Path) -> None:
    """Give the checkpoint that was written aside its name, and point at it; durable at the end."""
    if checkpoint.exists():  # a damaged one, or one that the pointer never came to name
        remove(checkpoint)
    flush_to_disk(aside(checkpoint))
    os.replace(aside(checkpoint), checkpoint)
    flush_to_disk(checkpoint.parent)
    point_at(checkpoint)


def point_at(checkpoint: Path) -> None:
    """Make this the checkpoint in force, at one stroke and durably."""
    pointer = checkpoint.parent / _POINTER
    new = pointer.with_name(pointer.name + UNFINISHED)
    new.write_text(checkpoint.name)
    flush_to_disk(new)
    os.replace(new, pointer)
    flush_to_disk(pointer.parent)


def link_best(checkpoint: Path) -> None:
    """Make the link `best` name this checkpoint, at one stroke."""
    link = checkpoint.parent / _BEST
    new = link.with_name(link.name + UNFINISHED)
    new.unlink(missing_ok=True)
    new.symlink_to(checkpoint.name)
    os.replace(new, link)
    flush_to_disk(link.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: first its name, so that no kill leaves half of it that looks whole."""
    doomed = checkpoint.with_name(checkpoint.name + _REMOVED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    flush_to_disk(doomed.parent)
    shutil.rmtree(doomed)


def set_aside(checkpoint: Path) -> None:
    """Take a damaged checkpoint's name away; its files stay, with `.damaged` behind the name."""
    if checkpoint.exists():  # the pointer may name one that is gone
        target = checkpoint.with_name(checkpoint.name + _DAMAGED)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(checkpoint, target)
        flush_to_disk(checkpoint.parent)


def remove_old(
    newest: Path, keep_last: int, keep_every: int | None, others: Collection[int] = ()
) -> None:
    """Remove the checkpoints before `newest` but the last `keep_last` (with it), those of multiples
    of `keep_every` and of `others`, the best one, and one that is being read."""
    older = [c for c in checkpoints(newest.parent) if iteration_of(c) < iteration_of(newest)]
    for checkpoint in older[: max(len(older) - (keep_last - 1), 0)]:
        iteration = iteration_of(checkpoint)
        kept = iteration in others or (keep_every is not None and iteration % keep_every == 0)
        if not (kept or checkpoint == best(newest.parent) or _is_read(checkpoint)):
            remove(checkpoint)


def clear_leftovers(run: Path) -> None:
    """Remove what killed runs left unfinished or half removed."""
    for path in run.iterdir():
        name, ending = path.stem, path.suffix
        if _NAME.fullmatch(name) and ending in (UNFINISHED, _REMOVED):
            shutil.rmtree(path)


@contextlib.contextmanager
def being_read(checkpoint: Path) -> Iterator[None]:
    """Inside, no run removes this checkpoint (where there are locks). Raises DamagedCheckpoint."""
    try:
        file = (checkpoint / MANIFEST).open()
    except FileNotFoundError:
        raise no_manifest(checkpoint) from None
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _is_read(checkpoint: Path) -> bool:
    try:
        # NFS wants a file that is open for writing.
        with (checkpoint / MANIFEST).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
