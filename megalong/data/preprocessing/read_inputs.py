"""Whether the inputs that a killed run has read are still what they were: files by their size and
time, streams by what they give."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from megalong.data.formats import raw_documents
from megalong.data.preprocessing.unfinished import InputSpent
from megalong.data.text.documents import Reading
from megalong.data.text.files import content_files, is_stream, shown

INPUTS = "inputs.jsonl"  # in the folder of an unfinished run


def file_state(path: str) -> dict:
    """What tells that a file, or a folder of files, has changed. Nothing is known of a stream."""
    try:
        stats = None if is_stream(path) else [os.stat(file) for file in content_files(path)]
    except OSError:
        stats = None
    if stats is None:
        return {"path": path, "size": None, "modified": None}
    modified = max((stat.st_mtime_ns for stat in stats), default=None)
    return {"path": path, "size": sum(stat.st_size for stat in stats), "modified": modified}


def changed_input(
    files: list[str], reading: Reading, bar: tqdm, folder: Path, progress: dict
) -> str | None:
    """Which of the files that have been read is no longer what it was. Raises InputSpent for a
    stream."""
    done = progress["place"][0]
    try:
        with open(folder / INPUTS, encoding="utf-8") as lines:
            states = [json.loads(line) for line in itertools.islice(lines, done)]
    except (OSError, ValueError) as error:
        return f"{INPUTS} is damaged ({error})"
    for path, then in zip(files, [*states, *progress["current"]], strict=False):
        now = file_state(path)
        if (now["size"], now["modified"]) != (then["size"], then["modified"]):
            return f"{path} has changed since it was read"
    # Last: once they are read, the job cannot begin anew.
    for path, then in zip(files, states, strict=False):
        if is_stream(path):
            bar.write(f"{shown(path)}: read to see that it gives the same again", file=sys.stderr)
            if stream_sha256(path, reading) != then["sha256"]:
                raise InputSpent(
                    f"{folder}: {shown(path)} gives something else than when it was read: give the"
                    f" same as then to go on, or {removal(folder)}"
                )
    return None


def stream_sha256(path: str, reading: Reading) -> str:
    """The hash of all that a stream gives, as `_Run` takes it."""
    digest = hashlib.sha256()
    for document in raw_documents(path, reading, lambda line: None):
        digest.update(document.data or b"")
    return digest.hexdigest()


def removal(folder: Path) -> str:
    return f"remove {folder} to begin anew"
