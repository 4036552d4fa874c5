"""Readers of YAML, and writers of files and folders that survive a power cut."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalong.utils.errors import UserError

UNFINISHED = ".tmp"  # behind the name of what is still being written


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writable_folder(flag: str, folder: Path) -> None:
    """Make the folder of a flag, where it is not there, and a file in it, before the work whose
    result belongs there. Raises UserError where that cannot be."""
    what = "cannot be made"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        what = "no file can be made there"
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # may name a file that is gone
        raise UserError(f"{flag} {folder}: {what}: {error.strerror}") from error


@contextmanager
def written_aside(folder: Path, replaces: bool = False) -> Iterator[Path]:
    """Make a new folder to write into, `.tmp` until the block ends, on the disk, then `folder`.

    replaces: it may take the place of one, which stays untouched on an error. Raises UserError
    where there is one that it may not.
    """
    if os.path.lexists(folder) and not replaces:
        raise UserError(f"{folder} is there already: choose another folder, or --overwrite")
    aside = folder.with_name(folder.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            flush_to_disk(path)
        if folder.exists():
            replaced = folder.with_name(folder.name + ".replaced")
            shutil.rmtree(replaced, ignore_errors=True)  # of one that was killed here
            os.replace(folder, replaced)
            os.replace(aside, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    flush_to_disk(folder.parent)


def read_yaml(place: str, path: str | Path, loader: type | None = None) -> tuple[str, Any]:
    """Return the text and the content of a file. Raises UserError, with the line that is no YAML.

    place: how messages begin, the flag with the file. loader: of PyYAML, default its safe one.
    """
    import yaml  # not for --help

    try:
        text = Path(path).read_text(encoding="utf-8")
        return text, yaml.load(text, loader or yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not YAML: {error}") from error
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        if problem == "could not find expected ':'":  # is found behind the key that has none
            problem, mark = "a colon is missing", error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{place}{where}: not YAML: {problem or error}") from error
