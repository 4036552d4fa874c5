"""A job of many hours that goes on where it was killed.

All that it writes is in a folder beside its output, PREFIX.unfinished: files that only grow, and
state.json, which says how long each of them was when a part of the work was finished, and how far
the work was then. The files are made durable first and state.json is replaced after them, so that
the two agree wherever a job is killed; what lies behind in the files is cut off when it goes on.
The files get their names when all is done.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megalong.utils.errors import UserError
from megalong.utils.files import flush_to_disk, writable_folder
from megalong.utils.progress import human_bytes

SUFFIX = ".unfinished"
INDEX = ".idx"  # of the output; readers take its presence for completeness
STATE, LOCK = "state.json", "lock"
BEGIN_ANEW = "give the same as then to go on, or --overwrite to begin anew"


class DiskFull(UserError):
    """There is no room for what was to be written."""


class InputSpent(UserError):
    """The input cannot be read another time, so that a job can neither go on nor begin anew."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the operating system is a UserError that names the file, and for a disk
    without room a DiskFull that says what is free."""
    try:
        yield
    except OSError as error:
        message = f"{path}: {error.strerror or error}"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(message) from error
        free = human_bytes(shutil.disk_usage(path.parent).free)
        raise DiskFull(f"{message} ({free} free there)") from error


class GrowingFile:
    """A file of a job, cut to what was finished of it; `size` bytes long."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        # Unbuffered: what fails, fails where it is written, and not again when it is closed.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed by close()
        self._file.truncate(size)

    def write(self, data: Any) -> None:
        """Appends bytes, or the memory of an array."""
        view = memoryview(data).cast("B")
        with disk_errors(self.path):
            while view:
                written = self._file.write(view)
                view, self.size = view[written:], self.size + written

    def make_durable(self) -> None:
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Unfinished:
    """The folder of a job, locked; a context manager.

    prefix: how the names of its output begin. identity: what a job must have in common with the one
    that it goes on, by the flag or the words for it; JSON-able.
    changed: asked about the `progress` of a job that is there, answers what has changed since then
        so that it cannot go on, or None; may raise InputSpent.
    overwrite: begin anew where the job that is there is another one, but for InputSpent.
    progress: what `finish_part` was given last; {} where nothing is finished.
    anew: never go on.
    naming: all is done but for names, so that only `give_names` remains.

    Left by an error, the folder stays if a part was finished, and else goes.
    Raises UserError where another process has the folder, where the job that is there is another
    one, and where its files are damaged.
    """

    def __init__(
        self,
        prefix: str,
        identity: dict[str, Any],
        changed: Callable[[Path, dict], str | None] = lambda folder, progress: None,
        *,
        overwrite: bool = False,
        anew: bool = False,
    ) -> None:
        self.folder = Path(prefix + SUFFIX)
        self._identity = json.loads(json.dumps(identity))
        self._files: dict[str, GrowingFile] = {}
        self._moves: list[tuple[str, str]] = []
        self._obsolete: list[str] = []
        writable_folder("--output-prefix", self.folder.parent)
        self._lock = self._take_lock(prefix)
        self.progress: dict = {}
        self._sizes: dict[str, int] = {}
        try:
            if not anew:
                self._go_on(changed)
        except UserError as error:
            if not overwrite or isinstance(error, InputSpent):
                self._lock.close()
                raise
        if not self.progress:
            self._remove_files()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *exception) -> None:
        for file in self._files.values():
            file.close()
        if not self.progress:
            self._remove()
        self._lock.close()

    @property
    def naming(self) -> bool:
        return bool(self._moves)

    def file(self, name: str) -> GrowingFile:
        """A file of the folder to append to, as long as it was when the last part was finished."""
        with disk_errors(self.folder / name):
            self._files[name] = GrowingFile(self.folder / name, self._sizes.get(name, 0))
        return self._files[name]

    def finish_part(self, progress: dict) -> None:
        """Makes everything written so far, and `progress`, what a later job goes on from.
        progress: JSON-able, not empty."""
        self.make_durable()
        self._sizes = {name: file.size for name, file in self._files.items()}
        self._write_state(progress)
        self.progress = progress

    def make_durable(self) -> None:
        """Has everything written so far on the disk."""
        for file in self._files.values():
            file.make_durable()

    def plan_names(self, moves: list[tuple[str, str]], obsolete: list[str] = ()) -> None:
        """Notes which names the files, which are durable, are to have: then nothing else remains.

        moves: (name in the folder, path) pairs, in this order; an index makes an output complete.
        obsolete: files of an earlier output that have no successor.
        """
        parent = self.folder.parent
        self._moves = [(name, os.path.relpath(path, parent)) for name, path in moves]
        self._obsolete = [os.path.relpath(path, parent) for path in obsolete]
        self._write_state(self.progress)

    def give_names(self) -> None:
        """Ends the job, in the order of `plan_names`, and goes on where that was interrupted."""
        moves = [
            (self.folder / name, self.folder.parent / path)
            for name, path in self._moves
            if (self.folder / name).exists()
        ]
        for _, path in moves:
            # Without its last file an old output is not taken for the new one, wherever this ends.
            if path.suffix == INDEX:
                path.unlink(missing_ok=True)
        for path in self._obsolete:
            (self.folder.parent / path).unlink(missing_ok=True)
        for source, path in moves:
            with disk_errors(path):
                os.replace(source, path)
        flush_to_disk(self.folder.parent)
        self.progress = {}  # nothing is left to go on with

    def abandon(self) -> None:
        """Have nothing left of the job, finished or not."""
        self.progress = {}

    def _take_lock(self, prefix: str):
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
            lock = open(self.folder / LOCK, "ab")  # noqa: SIM115, closed by __exit__
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"another process is writing {prefix}, in {self.folder}") from None
        except OSError:
            pass  # some network file systems have no locks
        try:
            same = os.path.samestat(os.fstat(lock.fileno()), os.stat(self.folder / LOCK))
        except FileNotFoundError:
            same = False
        if not same:  # another process has finished in the meantime
            lock.close()
            raise UserError(f"another process has written {prefix} just now")
        return lock

    def _go_on(self, changed: Callable[[Path, dict], str | None]) -> None:
        """Read what the job that is there had finished. Raises UserError: it cannot go on."""
        path = self.folder / STATE
        if not path.exists():
            return
        try:
            state = json.loads(path.read_bytes())
            content = state["content"]
            sound = state["sha256"] == _digest(content)
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise UserError(f"{path}: damaged: --overwrite begins anew")
        for name in {*self._identity, *content["identity"]}:
            then, now = content["identity"].get(name), self._identity.get(name)
            if then != now:
                raise UserError(
                    f"{self.folder}: begun with {name} {_words(then)}, and now it is {_words(now)}:"
                    f" {BEGIN_ANEW}"
                )
        sizes = {} if content["moves"] else content["sizes"]
        for name, size in sizes.items():
            file = self.folder / name
            there = file.stat().st_size if file.exists() else 0
            if there < size:
                raise UserError(
                    f"{file}: damaged: {there:,} bytes are left of {size:,} that were finished:"
                    " --overwrite begins anew"
                )
        reason = changed(self.folder, content["progress"])
        if reason is not None:
            raise UserError(f"{self.folder}: {reason}: {BEGIN_ANEW}")
        self.progress, self._sizes = content["progress"], sizes
        self._moves, self._obsolete = content["moves"], content["obsolete"]

    def _write_state(self, progress: dict) -> None:
        content = {"identity": self._identity, "sizes": self._sizes, "progress": progress}
        content |= {"moves": self._moves, "obsolete": self._obsolete}
        path = self.folder / STATE
        with disk_errors(path):
            write_durably(
                path.with_suffix(".tmp"), {"content": content, "sha256": _digest(content)}
            )
            os.replace(path.with_suffix(".tmp"), path)
            flush_to_disk(self.folder)

    def _remove_files(self) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK:
                path.unlink()

    def _remove(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / STATE).unlink(missing_ok=True)  # first: half of a job is none
            self._remove_files()
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()


def write_durably(path: Path, content: dict) -> None:
    """Writes JSON that survives a power cut."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return {"None": "none", "True": "on", "False": "off"}.get(str(value), str(value))
