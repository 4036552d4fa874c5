"""Collects the Python standard library's own source code as a small corpus for the quickstart.

    python examples/quickstart/collect_python_source.py --output stdlib.jsonl

Every Python installation has it, so the quickstart needs no download: about 10 MB of varied,
well-written text. Output: JSON lines, one file each, {"text": source, "path": relative path}.
The files are shuffled with a fixed seed, so that a split by documents (the first ones to train on,
the rest held out) holds out a fair sample of the library and not its last folders.
Deterministic for a given Python version.
"""

import json
import os
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError

SHUFFLE_SEED = 1234

# Other people's packages, tests (long, repetitive), and data that only looks like source.
SKIPPED_FOLDERS = {
    "__pycache__",
    "_bundled",
    "dist-packages",
    "encodings",  # nearly all of it generated character maps
    "idle_test",
    "lib2to3",  # gone from Python 3.13: leaving it out keeps the corpora of versions alike
    "site-packages",
    "test",
    "tests",
}
# Generated tables, in which there is nothing to learn but the table.
SKIPPED_FILES = {
    "html/entities.py",
    "keyword.py",
    "pydoc_data/topics.py",
    "stringprep.py",
    "token.py",
}


def source_files(library: Path) -> list[Path]:
    """The files of the standard library worth training on, in a fixed shuffled order."""
    found = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS and not name.startswith("config-")
        ]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    found = [
        path
        for path in found
        if path.relative_to(library).as_posix() not in SKIPPED_FILES
        and not path.name.startswith("_sysconfigdata")
    ]
    found.sort(key=lambda path: path.relative_to(library).as_posix())
    random.Random(SHUFFLE_SEED).shuffle(found)
    return found


def records(library: Path, max_bytes: int | None) -> Iterator[dict[str, str]]:
    """Yields {"text", "path"} of each file, until the texts reach max_bytes UTF-8 bytes."""
    total = 0
    for path in source_files(library):
        try:
            source = path.read_bytes()  # bytes: line ends stay as they are
            text = source.decode("utf-8")
        except (OSError, UnicodeDecodeError):  # a few files declare another encoding
            continue
        if not text.strip():
            continue
        total += len(source)
        if max_bytes is not None and total > max_bytes:
            return
        yield {"text": text, "path": path.relative_to(library).as_posix()}


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the JSON-lines file to write")
    parser.add_argument("--max-bytes", type=int, help="stop before the texts exceed so many bytes")
    args = parser.parse_args()

    library = Path(sysconfig.get_path("stdlib"))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(args.output.name + ".partial")
    files = size = 0
    with open(temporary, "w", encoding="utf-8") as output:
        for record in records(library, args.max_bytes):
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            files += 1
            size += len(record["text"].encode())
    if not files:
        temporary.unlink()
        raise UserError(f"no Python source below --max-bytes {args.max_bytes}")
    os.replace(temporary, args.output)
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"{args.output}: {files} files, {size:,} bytes (standard library of Python {version})")


if __name__ == "__main__":
    run(main)
