"""Text files to .bin/.idx: reading, tokenizing in parallel, writing in input order.

The parent cuts files into batches of raw documents and writes what comes back; decoding, parsing
and tokenizing happen in workers. At most a few batches per worker are under way, so that memory
does not grow with the corpus, and results are taken in the order in which they were handed out.
So how far a run is, is one place in the input, and a run that was killed goes on from the last one
that it had noted (`megalong.data.preprocessing.unfinished`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from megalong import __version__
from megalong.data.formats import raw_documents
from megalong.data.indexed import token_dtype
from megalong.data.preprocessing.inputs import (
    INPUTS,
    InputHashes,
    Partition,
    changed_input,
    file_state,
    removal,
)
from megalong.data.preprocessing.tokenizing import (
    BatchResult,
    TokenizingTask,
    tokenized,
)
from megalong.data.preprocessing.unfinished import DiskFull, Unfinished
from megalong.data.preprocessing.writer import KeySummary, Output, refuse_existing
from megalong.data.text.documents import RawDocument, Remarks
from megalong.data.text.files import is_stream, shown, total_size
from megalong.data.tokenizers.backend import choose_backend
from megalong.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megalong.utils.errors import UserError, counted
from megalong.utils.progress import human_bytes

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 4096
PART_BYTES = 256 << 20
SIDECAR_VERSION = 2


class Place(NamedTuple):
    """A place in the input: behind so many documents of a file, by its number."""

    file: int
    documents: int


class _End(NamedTuple):
    """Where a batch ends: the place behind it. stream: where that is in a stream, which cannot be
    read again, the sha256 of what has been read of it."""

    place: Place
    stream: str | None


@dataclass
class Summary:
    """left_out: how many files were not meant to be read, by what they are. bytes_read: of the
    files on disk. resumed, resumed_bytes: documents that an earlier run had written, and their
    text."""

    keys: dict[str, KeySummary]
    files: int
    skipped: int = 0
    cut_short: int = 0  # files whose rest could not be read
    left_out: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    resumed: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0


def output_prefix(prefix: str, key: str) -> str:
    """Megatron's name of the files of one key, without .bin and .idx."""
    return f"{prefix}_{key}_document"


def preprocess(
    files: list[str],
    prefix: str,
    task: TokenizingTask,
    *,
    workers: int = 1,
    overwrite: bool = False,
    strict: bool = False,
    partition: Partition | None = None,
    part_bytes: int = PART_BYTES,
    progress: tqdm,
) -> Summary:
    """Tokenize files into one .bin/.idx/.json per key, named by output_prefix().

    Documents keep the order of `files` and of the lines in them. The same call goes on where this
    one was killed, from the last part noted in PREFIX.unfinished. A stream has to give the same
    again, with overwrite too.

    Args:
        overwrite: begin anew where inputs, tokenizer or task differ from those of a killed call.
        strict: a broken document is an error; else it is named, counted and left out.
        partition: which share of a larger input `files` are; then there may be no documents in it,
            and the hashes of the texts are kept for a merge.
        part_bytes: of input, after which what is written is noted.

    Raises:
        UserError: nothing is left to write, the output cannot be written, or a worker died.
    """
    start = time.monotonic()
    tokenizer = build_tokenizer(task.tokenizer_type, task.tokenizer_model)
    if task.prepend_bos and tokenizer.bos is None:
        raise UserError("--prepend-bos: this tokenizer has no beginning-of-text token")
    prefixes = [output_prefix(prefix, key) for key in task.json_keys]
    identity = _identity(files, task, tokenizer, partition)
    changed = functools.partial(changed_input, files, task.reading, progress)
    with Unfinished(prefix, identity, changed, overwrite=overwrite) as job:
        if job.naming:  # killed at the very end
            summary, _ = _read_progress(job.progress)
            _note_resumed(summary)
        else:
            refuse_existing(prefixes, overwrite)
            run = _Run(files, task, tokenizer, partition, job, prefixes, progress)
            with _what_remains(job, run):
                summary = run.tokenize(workers, strict, part_bytes)
        job.give_names()
    summary.seconds = time.monotonic() - start
    return summary


class _Run:
    """One run of `preprocess`, in the folder of an unfinished job."""

    def __init__(
        self,
        files: list[str],
        task: TokenizingTask,
        tokenizer: Tokenizer,
        partition: Partition | None,
        job: Unfinished,
        prefixes: list[str],
        progress: tqdm,
    ) -> None:
        self._remarks = Remarks(progress)
        self._files, self._task, self._tokenizer = files, task, tokenizer
        self._partition, self._job, self._progress = partition, job, progress
        self._sizes = [total_size([file]) or 0 for file in files]
        self._streamed = {}  # number of a stream -> sha256 of what has been read of it
        if job.progress:
            self.summary, self._place = _read_progress(job.progress)
            self._stream = job.progress["stream"]
            self._remarks.skipped = self.summary.skipped
        else:
            keys = {
                key: KeySummary(prefix, deduplicate=task.deduplicate)
                for key, prefix in zip(task.json_keys, prefixes, strict=True)
            }
            self.summary, self._place = Summary(keys, len(files)), Place(0, 0)
            self._stream = None
        self._inputs = job.file(INPUTS)
        self._noted = self._place.file  # files before this one are in INPUTS
        dtype = token_dtype(tokenizer.vocab_size)
        self._outputs = {
            key: Output(
                job, part, dtype, keep_hashes=partition is not None, masks_loss=task.masks_loss
            )
            for key, part in self.summary.keys.items()
        }

    def tokenize(self, workers: int, strict: bool, part_bytes: int) -> Summary:
        summary, progress, start = self.summary, self._progress, time.monotonic()
        first = summary.keys[self._task.json_keys[0]]
        _note_resumed(summary)
        if self._job.progress:
            progress.write(
                f"{self._job.folder}: going on behind {counted(first.documents, 'document')}",
                file=sys.stderr,
            )
            progress.update(summary.bytes_read)
        finished = summary.bytes_read
        task = self._task
        tokenizer = choose_backend(
            self._tokenizer, task.backend, self._files, task.reading, self._remarks.say
        )
        with (
            InputHashes() as hashes,
            tokenized(self._batches(hashes), task, tokenizer, workers, self._job.folder) as results,
        ):
            for (self._place, self._stream), result in results:
                self._write(result, strict)
                rate = (first.documents - summary.resumed) / (time.monotonic() - start + 1e-9)
                progress.set_postfix_str(
                    f"{counted(first.documents, 'document')}, {rate:,.0f}/s", refresh=False
                )
                progress.update(result.size)
                if summary.bytes_read - finished >= part_bytes:
                    self._finish_part(hashes)
                    finished = summary.bytes_read
            self._place = Place(len(self._files), 0)
            self._note_inputs(hashes)
        for key, part in summary.keys.items():
            if not part.documents and self._partition is None:
                raise NothingFound(_nothing_found(key, part, summary))
            self._outputs[key].count_repeats()
        self._finish_part(hashes)
        ends = [
            output.finish(self._description(key), self._inputs.path)
            for key, output in self._outputs.items()
        ]
        # Their names are given by the caller.
        self._job.plan_names(*(list(itertools.chain(*parts)) for parts in zip(*ends, strict=True)))
        return summary

    def space_needed(self) -> int | None:
        """Bytes that the rest will take, from what was written for the input read so far; None
        where that is not known."""
        if not self.summary.bytes_read or any(map(is_stream, self._files)):
            return None
        total = max(sum(self._sizes) / self.summary.bytes_read, 1)
        written = sum(output.size for output in self._outputs.values())
        index = 20 * sum(part.documents for part in self.summary.keys.values())
        return int(total * (written + index)) - written

    def _batches(self, hashes: InputHashes) -> Iterator[tuple[list[RawDocument], _End]]:
        """Groups the documents behind `_place`, across files too, into batches of about
        BATCH_BYTES."""
        batch, size, begin = [], 0, self._place
        for number in range(begin.file, len(self._files)):
            path, count = self._files[number], 0
            hashes.begin(number, path)
            digest = None
            if is_stream(path):
                digest = self._streamed[number] = hashlib.sha256()
            found = raw_documents(path, self._task.reading, self._remarks.say)
            for count, document in enumerate(found, start=1):
                if digest is not None:
                    digest.update(document.data or b"")
                place = Place(number, count)
                if place <= begin:  # read by an earlier run
                    if document.error is not None:
                        raise UserError(
                            f"{document.place}: {document.error}; {begin.documents:,} documents"
                            " of it had been read before"
                        )
                    if place == begin and digest and digest.hexdigest() != self._stream:
                        raise UserError(
                            f"{shown(path)} does not begin with what has been read of it:"
                            f" {removal(self._job.folder)}"
                        )
                    continue
                if document.error is not None:  # and so is the last of its file
                    place = Place(number + 1, 0)
                batch.append(document)
                size += document.weight
                if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                    yield batch, self._end(place)
                    batch, size = [], 0
            if Place(number, count) < begin:
                raise UserError(
                    f"{shown(path)}: it gives {counted(count, 'document')}, and"
                    f" {begin.documents:,} had been read from it before:"
                    f" {removal(self._job.folder)}"
                )
        if batch:
            yield batch, self._end(Place(len(self._files), 0))

    def _end(self, place: Place) -> _End:
        digest = self._streamed.get(place.file)
        return _End(place, None if digest is None else digest.hexdigest())

    def _write(self, result: BatchResult, strict: bool) -> None:
        summary = self.summary
        for problem in result.problems:
            if strict:
                raise UserError(f"{problem} (--strict)")
            self._remarks.skip(str(problem))
            note = {"file": problem.file, "line": problem.line, "reason": problem.reason}
            for key in [problem.key] if problem.key is not None else summary.keys:
                self._outputs[key].skip(note)
        for key, part in result.keys.items():
            self._outputs[key].add_part(part)
        summary.skipped = self._remarks.skipped
        summary.cut_short += result.cut_short
        summary.left_out = dict(collections.Counter(summary.left_out) + result.left_out)
        summary.bytes_read += result.size

    def _finish_part(self, hashes: InputHashes) -> None:
        self._note_inputs(hashes)
        current = self._files[self._place.file : self._place.file + 1]
        self._job.finish_part(
            {
                "summary": dataclasses.asdict(self.summary),
                "place": self._place,
                "stream": self._stream,
                "current": [file_state(file) for file in current],
            }
        )

    def _note_inputs(self, hashes: InputHashes) -> None:
        """The files that are done with, with their hashes."""
        lines = []
        for number in range(self._noted, self._place.file):
            digest = hashes.take(number)
            if number in self._streamed:
                digest = self._streamed[number].hexdigest()
            lines.append(json.dumps(file_state(self._files[number]) | {"sha256": digest}) + "\n")
        self._inputs.write("".join(lines).encode())
        self._noted = self._place.file

    def _description(self, key: str) -> dict:
        """The sidecar PREFIX.json, besides what is counted."""
        task, tokenizer = self._task, self._tokenizer
        partition = dataclasses.asdict(self._partition) if self._partition else None
        return {
            "json_key": key,
            "prompt_key": task.reading.prompt_key,
            "tokenizer_type": task.tokenizer_type,
            "tokenizer_model": task.tokenizer_model,
            "tokenizer_sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "append_eod": task.append_eod,
            "prepend_bos": task.prepend_bos,
            "min_tokens": task.min_tokens,
            "deduplicate": task.deduplicate,
            "partition": partition,
            "files_cut_short": self.summary.cut_short,
            "files_left_out": self.summary.left_out,
            "megalong": __version__,
            "version": SIDECAR_VERSION,
        }


class NothingFound(UserError):
    """There is nothing to write."""


@contextlib.contextmanager
def _what_remains(job: Unfinished, run: _Run) -> Iterator[None]:
    """Inside, every error says what is left of the work."""
    try:
        yield
    except NothingFound:
        job.abandon()
        raise
    except UserError as error:
        message = str(error)
        needed = run.space_needed() if isinstance(error, DiskFull) else None
        if needed is not None:
            message += f"; the rest of the output needs about {human_bytes(needed)}"
        if job.progress:
            raise UserError(f"{message}; {goes_on(job.folder)}") from error
        raise UserError(f"{message}; nothing was written") from error


def goes_on(folder: Path) -> str:
    """What is said of an unfinished run."""
    return f"what was finished is kept in {folder}, and the same command goes on from there"


def _identity(
    files: list[str], task: TokenizingTask, tokenizer: Tokenizer, partition: Partition | None
) -> dict:
    """What a run must have in common with the one that it goes on, by flag."""
    # A stream is known by what it gives: a shell numbers them as it likes.
    known = ["-" if is_stream(file) else file for file in files]
    names = hashlib.sha256("\0".join(known).encode(errors="surrogateescape")).hexdigest()
    values = dataclasses.asdict(task)
    values |= values.pop("reading")
    flags = {
        f"--{name.replace('_', '-')}": value
        for name, value in values.items()
        if name not in ("tokenizer_model", "backend")
    }
    return {
        "--input": f"{counted(len(files), 'file')}, {names[:12]} by their names",
        **flags,
        "the tokenizer of sha256": tokenizer.fingerprint[:12],
        "--partition": None if partition is None else str(partition),
        "megalong": __version__,
        "the version of the format": SIDECAR_VERSION,
    }


def _read_progress(progress: dict) -> tuple[Summary, Place]:
    values = progress["summary"]
    keys = {key: KeySummary(**part) for key, part in values["keys"].items()}
    return Summary(**values | {"keys": keys}), Place(*progress["place"])


def _note_resumed(summary: Summary) -> None:
    summary.resumed = next(iter(summary.keys.values())).documents
    summary.resumed_bytes = sum(part.bytes for part in summary.keys.values())


def _nothing_found(key: str, part: KeySummary, summary: Summary) -> str:
    keys = any(problem["reason"].startswith(("no key", "no column")) for problem in part.listed)
    hint = "; --json-keys names the keys of the texts" if keys else ""
    short = f", {part.short} shorter than --min-tokens" if part.short else ""
    return (
        f"--input: no document with text under the key {key!r} in"
        f" {counted(summary.files, 'file')} ({summary.skipped} skipped, {part.empty} empty{short});"
        f" nothing was written{hint}"
    )
