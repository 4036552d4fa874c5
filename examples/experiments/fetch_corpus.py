"""Long real documents from packages of Debian: the sources of Linux, GCC and Rust, and the RFCs.

    python examples/experiments/fetch_corpus.py --output runs/corpus --max-bytes 40000000

Downloads the packages with `apt-get download` into --packages-folder (no root, nothing is
installed; a package that lies there already is not fetched again), unpacks them with `dpkg-deb` and
`tar`, and writes into --output

    train.jsonl, held_out.jsonl    {"text", "path"} a line: a long document each
    corpus.json                    packages with versions and sha256, counts, bytes and flags
    seen.json                      of each held-out document the share that train.jsonl has too

The files that lie in a directory itself are one document, in the order of their names: parts of one
thing, which speak of each other. Of doc-rfc-* each file is one. A file that another document has is
left out, so that none is on both sides; how much of the held-out documents stands in the others all
the same is said, and one with more than --max-seen-share dropped. Directories of tests are left
out, documents below --min-bytes too, and of longer ones than --max-document-bytes the rest. So are,
with --min-window-gain, those in which little is said again from afar: what a long context is worth
can be seen only where there is something to be seen. Which are taken, in which order, and which are
held out hangs on the sha256 of their paths; a larger corpus has the smaller one's documents on the
same side, but for files that others of its documents have. Needs Debian or what is made of it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from overlap import records, seen_shares

from megalong.data.formats import texts_of_folder
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, counted

PACKAGES = ("linux-source-6.12", "gcc-14-source", "rust-src")
# In Debian's part "non-free", which many machines have not.
WHERE_AVAILABLE = ("doc-rfc-std", "doc-rfc-informational")
SKIPPED_FOLDERS = {"test", "tests", "testsuite", "selftests", "testdata", "compile-benchmarks"}
WINDOW_BITS = range(9, 16)  # of zlib
LARGEST_FILE = 1 << 18  # bytes; above, mostly generated tables


class Candidate(NamedTuple):
    """A document that may be taken. name: package and path inside of it, free of versions and of
    where it lies. path: a folder, or a file."""

    name: str
    path: Path

    def texts(self) -> Iterator[str]:
        """Of each file."""
        if self.path.is_dir():
            yield from texts_of_folder(os.fspath(self.path), LARGEST_FILE)
        else:
            data = self.path.read_bytes()
            data = gzip.decompress(data) if self.path.suffix == ".gz" else data
            yield data.decode(errors="replace")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the documents")
    add("--packages", nargs="+", help=f"of source code, or doc-rfc-* (default: {PACKAGES}, RFCs)")
    add("--packages-folder", type=Path, help="where they are kept (default: OUTPUT/packages)")
    add("--max-bytes", type=int, default=400_000_000, help="of text to train on")
    add("--max-held-out-bytes", type=int, default=4_000_000, help="of text that is held out")
    add("--held-out-share", type=float, default=0.02, help="of the documents")
    add("--min-bytes", type=int, default=1 << 17, help="of a document")
    add("--max-document-bytes", type=int, default=1 << 19, help="that are taken of a document")
    add("--held-out-document-bytes", type=int, help="the same of those held out (default: as much)")
    add(
        "--min-window-gain",
        type=float,
        default=1.0,
        help="how many times smaller zlib makes a document with a window of --far-window than of"
        " --near-window",
    )
    windows = [1 << bits for bits in WINDOW_BITS]
    add("--near-window", type=int, choices=windows, default=1 << 10, help="bytes")
    add("--far-window", type=int, choices=windows, default=1 << 15, help="bytes")
    add(
        "--max-seen-share",
        type=float,
        help="of a held-out document's runs of four lines, that documents to train on have too"
        " (default: any)",
    )
    args = parser.parse_args()
    args.packages_folder = args.packages_folder or args.output / "packages"
    if not 0 < args.held_out_share < 1:
        raise UserError("--held-out-share must lie between 0 and 1")
    if args.held_out_document_bytes is None:
        args.held_out_document_bytes = args.max_document_bytes
    if args.max_seen_share is not None and not 0 < args.max_seen_share <= 1:
        raise UserError("--max-seen-share must be above 0, and 1 at most")
    for name in (
        *("max_bytes", "max_held_out_bytes", "min_bytes", "max_document_bytes"),
        "held_out_document_bytes",
    ):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    return args


def main() -> None:
    args = parse_arguments()
    debs = {}
    for package in args.packages or PACKAGES + WHERE_AVAILABLE:
        needed = args.packages is not None or package in PACKAGES
        deb = fetch(package, args.packages_folder, needed)
        if deb is not None:
            debs[package] = deb
    found = [
        candidate
        for package, deb in debs.items()
        for candidate in candidates(package, unpack(deb, args.packages_folder / "unpacked"))
    ]
    found.sort(key=lambda candidate: digest(candidate.name))
    args.output.mkdir(parents=True, exist_ok=True)
    written = write(found, args)
    corpus = {
        "packages": {name: {"file": deb.name, "sha256": sha256(deb)} for name, deb in debs.items()},
        "flags": {
            name: value
            for name, value in vars(args).items()
            if name not in ("output", "packages", "packages_folder") and value is not None
        },
        **written,
    }
    (args.output / "corpus.json").write_text(json.dumps(corpus, indent=2) + "\n")


def fetch(package: str, folder: Path, needed: bool) -> Path | None:
    """The package's file: the one that lies there, or one that is downloaded. None where apt has it
    not. Raises UserError where it is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (there := sorted(folder.glob(f"{package}_*.deb"))):
        print(f"downloading {package}", file=sys.stderr, flush=True)
        command = ["apt-get", "download", package]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError(
                "apt-get is not there: this needs Debian or what is made of it"
            ) from None
        there = sorted(folder.glob(f"{package}_*.deb"))
        if done.returncode or not there:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            if needed:
                raise UserError(
                    f"apt-get download {package}: {reason}: choose others with --packages, or put"
                    f" its .deb into {folder}"
                )
            print(f"{package} is not to be had here, and left out ({reason})", file=sys.stderr)
            return None
    return there[-1]


def unpack(deb: Path, folder: Path) -> Path:
    """The folder with the sources that a package has: what the archives in it hold, or else what is
    in usr/src, or else all."""
    target = folder / f"{deb.stem}.sources"
    if not target.exists():
        print(f"unpacking {deb.name}", file=sys.stderr, flush=True)
        partial = folder / f"{target.name}.partial"
        partial.mkdir(parents=True, exist_ok=True)
        run_quietly("dpkg-deb", "--extract", os.fspath(deb), os.fspath(partial))
        for archive in sorted(partial.glob("usr/src/**/*.tar.*")):
            (partial / "archives").mkdir(exist_ok=True)
            run_quietly("tar", "-xf", os.fspath(archive), "-C", os.fspath(partial / "archives"))
            archive.unlink()
        partial.rename(target)
    places = (target / "archives", target / "usr" / "src", target)
    return next(place for place in places if place.exists())


def run_quietly(*command: str) -> None:
    """Raises UserError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not there: this needs Debian's own tools") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {done.stderr.strip()}")


def candidates(package: str, root: Path) -> Iterator[Candidate]:
    """What may be a document in an unpacked package."""
    each_file = package.startswith("doc-")
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        where = Path(folder)
        if each_file:
            paths = [where / name for name in names if name.endswith((".txt", ".txt.gz"))]
        else:
            paths = [where]
        for path in paths:
            yield Candidate(f"{package}/{path.relative_to(root).as_posix()}", path)


def write(found: list[Candidate], args: argparse.Namespace) -> dict[str, dict]:
    """Writes both files. Returns counts and bytes of each. Raises UserError where one is empty."""
    from megalong.utils.progress import progress_bar

    room = {"train": args.max_bytes, "held_out": args.max_held_out_bytes}
    sizes = Counter()
    seen = set()
    paths = {part: args.output / f"{part}.jsonl" for part in room}
    partial = {part: path.with_suffix(".partial") for part, path in paths.items()}
    files = {part: path.open("w") for part, path in partial.items()}
    with progress_bar(sum(room.values()), "B", "writing") as bar, files["train"], files["held_out"]:
        for candidate in found:
            held_out = digest(f"held out {candidate.name}") < args.held_out_share * 2**64
            part = "held_out" if held_out else "train"
            if sizes[part] >= room[part]:
                if all(sizes[part] >= room[part] for part in room):
                    break
                continue
            texts = {digest(text): text for text in candidate.texts()}
            for known in texts.keys() & seen:
                del texts[known]
            content = "\n".join(texts.values()).encode()[: args.max_document_bytes]
            if len(content) < args.min_bytes:
                continue
            if window_gain(content, args.near_window, args.far_window) < args.min_window_gain:
                continue
            seen |= texts.keys()
            if held_out:
                content = content[: args.held_out_document_bytes]
            record = {"text": content.decode(errors="ignore"), "path": candidate.name}
            files[part].write(json.dumps(record) + "\n")
            sizes[part] += len(content)
            bar.update(len(content))
    for part, path in paths.items():
        if not sizes[part]:
            raise UserError(
                f"{path}: no document has --min-bytes {args.min_bytes} and --min-window-gain"
                f" {args.min_window_gain:g}"
            )
    most = 1.0 if args.max_seen_share is None else args.max_seen_share
    shares = drop_what_was_seen(partial["train"], partial["held_out"], most)
    (args.output / "seen.json").write_text(json.dumps(shares, indent=2) + "\n")
    for part, path in paths.items():
        partial[part].rename(path)
    return {part: about(path) for part, path in paths.items()}


def drop_what_was_seen(train: Path, held_out: Path, most: float) -> dict[str, float]:
    """Drops the held-out documents of which more than `most` stands in `train`. Returns the others'
    shares by path. Raises UserError where none is left."""
    shares = seen_shares(train, held_out)
    kept = [record for record in records(held_out) if shares[record["path"]] <= most]
    if not kept:
        raise UserError(
            f"--max-seen-share {most:g}: of every held-out document more stands in train.jsonl: set"
            " a larger one"
        )
    if len(kept) < len(shares):
        held_out.write_text("".join(json.dumps(record) + "\n" for record in kept))
    of_kept = {record["path"]: round(shares[record["path"]], 4) for record in kept}
    mean = sum(of_kept.values()) / len(of_kept)
    dropped = counted(len(shares) - len(kept), "document")
    print(
        f"of a held-out document's runs of four lines {mean:.1%} are in train.jsonl, on average;"
        f" {dropped} with more than {most:.0%} dropped"
    )
    return of_kept


def about(path: Path) -> dict[str, Any]:
    """Bytes and documents, those by package, which are printed too."""
    size, documents = 0, Counter()
    for record in records(path):
        size += len(record["text"].encode())
        documents[record["path"].partition("/")[0]] += 1
    print(f"{path}: {counted(documents.total(), 'document')}, {size:,} bytes")
    return {"bytes": size, "documents": dict(sorted(documents.items()))}


def window_gain(content: bytes, near: int, far: int) -> float:
    """How many times smaller zlib makes it where it looks back `far` bytes, not `near`."""

    def size(window: int) -> int:
        compressor = zlib.compressobj(9, wbits=-(window.bit_length() - 1))
        return len(compressor.compress(content)) + len(compressor.flush())

    return size(near) / size(far)


def digest(text: str) -> int:
    """64 bits that hang on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    run(main)
