"""Files that survive a power cut, and folders that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalong.errors import UserError

UNFINISHED = ".tmp"  # behind the name of what is still being written


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A new folder to write into, `.tmp` until the block ends, on the disk, then `folder`.

    Raises UserError where `folder` is there already; leaves nothing behind on an error.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already: remove it, or choose another folder")
    aside = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            flush_to_disk(path)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush_to_disk(folder.parent)
