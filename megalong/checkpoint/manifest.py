"""The manifest: size and SHA-256 of every file of a checkpoint, and what they give away."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

MANIFEST = "manifest.json"
TENSOR_FILES = ".distcp"
_BLOCK = 1 << 20
LONG = 1 << 30  # bytes to be hashed by one rank, from which on a progress bar is worth its lines


class DamagedCheckpoint(UserError):
    """A checkpoint that is not as it was written; the message names it and the file."""


@contextlib.contextmanager
def reading(checkpoint: Path, what: str) -> Iterator[None]:
    """Inside, whatever damaged bytes lead to is a DamagedCheckpoint that names `what`."""
    try:
        yield
    except Exception as error:
        message = f"{checkpoint} is damaged: {what} cannot be read: {error!r}"
        raise DamagedCheckpoint(message) from error


def no_manifest(checkpoint: Path) -> DamagedCheckpoint:
    """What a folder without a manifest is."""
    if not checkpoint.exists():
        return DamagedCheckpoint(f"{checkpoint} is not there")
    if not any(checkpoint.iterdir()):
        return DamagedCheckpoint(f"{checkpoint} is an empty folder")
    return DamagedCheckpoint(f"{checkpoint} is damaged: it has no {MANIFEST}")


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """ranks: processes that wrote the checkpoint. files: all but the manifest, by name."""

    ranks: int
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(record.size for record in self.files.values())

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(checkpoint: Path) -> Manifest:
        """Raises DamagedCheckpoint where there is none, or it cannot be read."""
        if not (checkpoint / MANIFEST).is_file():
            raise no_manifest(checkpoint)
        try:
            content = json.loads((checkpoint / MANIFEST).read_text())
            files = {name: FileRecord(**record) for name, record in content["files"].items()}
            return Manifest(int(content["ranks"]), files)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(
                f"{checkpoint} is damaged: {MANIFEST} is not what was written ({error})"
            ) from error


def record_of(path: Path, on_bytes: Callable[[int], object] | None = None) -> FileRecord:
    """Size and hash of a file; `on_bytes` hears of each block."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return FileRecord(size, digest.hexdigest())


def check_files(checkpoint: Path) -> Manifest:
    """Check, quickly, that every file is there and as long as it was, and the small ones are what
    they were. Raises DamagedCheckpoint."""
    manifest = Manifest.read(checkpoint)
    for name, record in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{checkpoint} is damaged: it has no {name}")
        if path.stat().st_size != record.size:
            raise DamagedCheckpoint(
                f"{checkpoint} is damaged: {name} has {path.stat().st_size:,} bytes instead of"
                f" {record.size:,}"
            )
    small = [name for name in manifest.files if not name.endswith(TENSOR_FILES)]
    check_hashes(checkpoint, manifest, small)
    return manifest


def check_share(checkpoint: Path, manifest: Manifest, rank: int = 0, ranks: int = 1) -> None:
    """Check that every `ranks`-th tensor file is bit for bit what was written. Raises
    DamagedCheckpoint."""
    names = sorted(name for name in manifest.files if name.endswith(TENSOR_FILES))[rank::ranks]
    size = sum(manifest.files[name].size for name in names)
    with progress_bar(
        size, "B", f"verifying {checkpoint.name}", enabled=not rank and size > LONG
    ) as bar:
        check_hashes(checkpoint, manifest, names, bar.update)


def check_hashes(
    checkpoint: Path,
    manifest: Manifest,
    names: list[str],
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """That these files are bit for bit what was written. Raises DamagedCheckpoint."""
    for name in names:
        try:
            found = record_of(checkpoint / name, on_bytes)
        except OSError as error:
            raise DamagedCheckpoint(
                f"{checkpoint} is damaged: {name} cannot be read ({error.strerror})"
            ) from error
        if found != manifest.files[name]:
            raise DamagedCheckpoint(
                f"{checkpoint} is damaged: {name} is not what was written (its SHA-256 differs)"
            )
