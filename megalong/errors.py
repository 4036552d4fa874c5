"""The one kind of error that is the user's to mend."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class UserError(ValueError):
    """What the user can mend. The message is one line that says all there is to know: the flag or
    the file, and what to set instead. Commands end with it (`megalong.command_line`); any other
    exception is a bug, and shows its traceback."""


@contextlib.contextmanager
def system_errors_of(flag: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, an error of the operating system (no such folder, no permission, a read-only or a
    full disk) is a UserError that names the flag with its value, the file, and the reason."""
    try:
        yield
    except OSError as error:
        file = "" if error.filename in (None, os.fspath(path)) else f"{error.filename}: "
        raise UserError(f"{flag} {path}: {file}{error.strerror or error}") from error
