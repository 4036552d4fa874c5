"""Arrays that take seconds to make, kept in a folder: one process makes them, all map the file.

So the ranks of a node share the memory too. The folder may be shared by nodes and by runs, and may
be emptied at any time between runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megalong.utils.errors import system_errors_of
from megalong.utils.files import writable_folder

LARGE = 100_000  # elements; what is smaller is made in no time
_FLAG = "--data-cache-path"


class IndexCache:
    """A folder (made where there is none) of arrays, each under a name that its origin decides."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        writable_folder(_FLAG, self._folder)
        self._digests: dict[int, tuple[np.ndarray, bytes]] = {}

    def array(self, origin: np.ndarray, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What make() returns, an int64 array, which the content of `origin` and `key` decide:
        made by the first process that asks, while others wait, and read by all."""
        if origin.size < LARGE:
            return make()
        name = hashlib.sha256(self._digest(origin) + key.encode()).hexdigest()[:40]
        path = self._folder / f"{name}.npy"
        with system_errors_of(_FLAG, self._folder):
            found = _mapped(path)
            if found is None:
                with self._only_one():
                    found = _mapped(path)
                    if found is None:
                        _write(path, make())
                        found = _mapped(path)
        return make() if found is None else found

    def _digest(self, origin: np.ndarray) -> bytes:
        """Of its content; of the same array it is computed once."""
        known = self._digests.get(id(origin))
        if known is None or known[0] is not origin:
            content = hashlib.sha256(str((origin.dtype.str, origin.shape)).encode())
            content.update(np.ascontiguousarray(origin).data)
            known = self._digests[id(origin)] = origin, content.digest()
        return known[1]

    @contextlib.contextmanager
    def _only_one(self) -> Iterator[None]:
        """Inside, no other process is, where the file system has locks; elsewhere two may make the
        same file, one after the other taking its name."""
        path = self._folder / "lock"
        try:
            lock = os.open(path, os.O_RDONLY)  # it may be another user's
        except FileNotFoundError:
            lock = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _write(path: Path, array: np.ndarray) -> None:
    """At one stroke: nobody sees a part of it."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # other users' runs may read it
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _mapped(path: Path) -> np.ndarray | None:
    """The array in a file, mapped into memory; None where there is none, or a broken one."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None
