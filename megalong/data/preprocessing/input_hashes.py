"""The sha256 of every input, taken while it is read for its documents.

A thread goes through the files a little ahead of who reads them, so that the disk is asked once and
the reader finds in memory what the thread has seen. It works for any format, and takes no time of
the reader's: hashing and reading let other threads run.
"""

from __future__ import annotations

import hashlib
import os
import threading

import numpy as np

from megalong.data.text.files import content_files

AHEAD = 64 << 20  # bytes that the thread may be ahead
_CHUNK = 1 << 20


class InputHashes:
    """The hashes of files from `first` on, which become known in order. A context manager.

    That of a folder is of the lines `sha256sum` has for its files. What is neither is not read.
    sizes: bytes of all files, as they were when the run began.
    """

    def __init__(self, files: list[str], sizes: list[int], first: int = 0) -> None:
        self._files, self._first = files, first
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._known: dict[int, str | None] = {}
        self._reached = int(self._starts[first])
        self._next = first
        self._stopped = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> InputHashes:
        return self

    def __exit__(self, *exception) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._thread.join()

    def reached(self, file: int, bytes_of_it: int = 0) -> None:
        """The reader is that far."""
        with self._condition:
            self._reached = int(self._starts[file]) + bytes_of_it
            self._condition.notify_all()

    def take(self, file: int) -> str | None:
        """The hash of a file that the reader is done with, once; None: it cannot be read."""
        with self._condition:
            # It may be far behind where a file has grown, or its rest was not read.
            self._reached = max(self._reached, int(self._starts[file + 1]))
            self._condition.notify_all()
            self._condition.wait_for(lambda: file < self._next)
            return self._known.pop(file)

    def _run(self) -> None:
        for file in range(self._first, len(self._files)):
            digest = self._digest(file)
            with self._condition:
                self._known[file], self._next = digest, file + 1
                self._condition.notify_all()
                if self._stopped:
                    return

    def _digest(self, file: int) -> str | None:
        path = self._files[file]
        self._position, self._end = int(self._starts[file]), int(self._starts[file + 1])
        try:
            if os.path.isfile(path):
                return self._digest_file(path)
            if not os.path.isdir(path):
                return None
            digest = hashlib.sha256()
            for part in content_files(path):
                line = f"{self._digest_file(part)}  {os.path.relpath(part, path)}\n"
                digest.update(line.encode(errors="surrogateescape"))
            return digest.hexdigest()
        except (OSError, _Stopped):
            return None

    def _digest_file(self, path: str) -> str:
        digest, chunk = hashlib.sha256(), bytearray(_CHUNK)
        with open(path, "rb", buffering=0) as content:
            while size := content.readinto(chunk):
                digest.update(memoryview(chunk)[:size])
                self._position = min(self._position + size, self._end)
                self._wait()
        return digest.hexdigest()

    def _wait(self) -> None:
        """Until the reader is near."""
        with self._condition:
            self._condition.wait_for(
                lambda: self._stopped or self._position <= self._reached + AHEAD
            )
            if self._stopped:
                raise _Stopped


class _Stopped(Exception):
    """Nobody waits for the hash any longer."""
