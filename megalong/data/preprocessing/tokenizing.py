"""Raw documents to tokens, in this process or in several."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from megalong.data.formats import texts
from megalong.data.indexed import token_dtype
from megalong.data.preprocessing.unfinished import disk_errors
from megalong.data.preprocessing.writer import HASHED, KeyResult, Problem, text_hashes
from megalong.data.text.documents import BrokenDocument, LeftOut, RawDocument, Reading
from megalong.data.tokenizers.backend import FastTokenizer
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.utils.errors import UserError

BATCHES_PER_WORKER = 3
PICKLED = "tokenizer.pickle"  # in the folder of an unfinished run
BYTES_UNDER_WAY = 64 << 20  # of text; one batch may have more
End = TypeVar("End")


@dataclass(frozen=True)
class TokenizingTask:
    """What is made of the texts.

    A document is a text, or of a reading with a prompt key the prompt and then the text, tokenized
    apart; then there is a loss mask, by which what stands before the text does not count.

    min_tokens: documents with fewer, all that is added to them counted, are left out.
    deduplicate: leave out documents whose text has come before. backend: which library makes the
        tokens (`megalong.data.tokenizers.backend`); they are the same.
    """

    tokenizer_type: str
    tokenizer_model: str | None
    reading: Reading
    append_eod: bool
    prepend_bos: bool = False
    min_tokens: int = 1
    deduplicate: bool = False
    backend: str = "usual"

    @property
    def json_keys(self) -> tuple[str, ...]:
        return self.reading.json_keys

    @property
    def masks_loss(self) -> bool:
        """Whether some tokens may not count in the loss."""
        return self.reading.prompt_key is not None


@dataclass
class BatchResult:
    """Documents by key. left_out: files that are not meant to be read, by what they are.
    cut_short: files whose rest cannot be read. size: bytes on disk."""

    keys: dict[str, KeyResult]
    problems: list[Problem]
    left_out: collections.Counter
    cut_short: int
    size: int


class _UnderWay(NamedTuple):
    """A batch that a worker has. place: of its first document. weight: bytes of text, about."""

    end: object
    place: str
    weight: int
    future: Future


@contextlib.contextmanager
def tokenized(
    batches: Iterator[tuple[list[RawDocument], End]],
    task: TokenizingTask,
    tokenizer: Tokenizer,
    workers: int,
    folder: Path,
) -> Iterator[Iterator[tuple[End, BatchResult]]]:
    """Yield the results of batches, in order, with what tells where each ends; the workers are gone
    at the end of the context.

    Args:
        workers: processes that make tokens; with 1 it is this process.
        folder: for a file that they are given the tokenizer by.

    Raises:
        UserError: a worker died.
    """
    if workers == 1:
        yield ((end, tokenize_batch(batch, task, tokenizer)) for batch, end in batches)
        return
    if isinstance(tokenizer, FastTokenizer):
        # The fast library, which looks all over large tables, takes 15% less time in large
        # pages, which processes that start now have.
        os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    # Spawned, not forked: the caller may have threads. A worker is given the tokenizer as it is
    # and imports neither Transformers nor torch, which would take hundreds of MB in each. It
    # comes by a file: a start with as much in its pipe would wait for the new process to read.
    pickled = folder / PICKLED
    with disk_errors(pickled), open(pickled, "wb") as file:
        pickle.dump(tokenizer, file)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (task, pickled))
    try:
        yield _tokenized_in(pool, batches, BATCHES_PER_WORKER * workers)
    finally:
        pool.shutdown(cancel_futures=True)
        pickled.unlink(missing_ok=True)


def _tokenized_in(
    pool: ProcessPoolExecutor, batches: Iterator[tuple[list[RawDocument], End]], most: int
) -> Iterator[tuple[End, BatchResult]]:
    """Yield the results of batches, of which at most so many are under way."""
    under_way: collections.deque[_UnderWay] = collections.deque()
    try:
        for documents, end in batches:
            weight = sum(document.weight for document in documents)
            future = pool.submit(_tokenize_in_worker, documents)
            under_way.append(_UnderWay(end, documents[0].place, weight, future))
            while (
                len(under_way) >= most or sum(batch.weight for batch in under_way) > BYTES_UNDER_WAY
            ):
                yield under_way[0].end, under_way[0].future.result()
                under_way.popleft()
        while under_way:
            yield under_way[0].end, under_way[0].future.result()
            under_way.popleft()
    except BrokenProcessPool:
        near = f" near {under_way[0].place}" if under_way else ""
        raise UserError(
            f"a tokenizing worker died{near} (killed, or out of memory: try fewer --workers)"
        ) from None


_worker: tuple[TokenizingTask, Tokenizer] | None = None  # set once in every worker process


def _start_worker(task: TokenizingTask, pickled: Path) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with open(pickled, "rb") as file:
        _worker = task, pickle.load(file)


def _exit_with_parent() -> None:
    """End with a killed parent, which cannot stop its workers: they would wait for it forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize_in_worker(batch: list[RawDocument]) -> BatchResult:
    return tokenize_batch(batch, *_worker)


def tokenize_batch(
    batch: list[RawDocument], task: TokenizingTask, tokenizer: Tokenizer
) -> BatchResult:
    """Decode, parse and tokenize raw documents."""
    made = {key: _Texts(task, tokenizer) for key in task.json_keys}
    problems: list[Problem] = []
    left_out: collections.Counter = collections.Counter()
    for document in batch:
        try:
            values = texts(document, task.reading)
        except BrokenDocument as error:
            values = {None: error}
        prompt = values.pop(task.reading.prompt_key, "") if task.masks_loss else ""
        if isinstance(prompt, BrokenDocument):
            values = {None: prompt}
        for key, text in values.items():
            if isinstance(text, LeftOut):
                left_out[text.kind] += 1
            elif isinstance(text, BrokenDocument):
                problems.append(_problem(document, text, key, task.json_keys))
            else:
                made[key].add(text, prompt)
    return BatchResult(
        {key: texts_of_key.result() for key, texts_of_key in made.items()},
        problems,
        left_out,
        cut_short=sum(document.error is not None for document in batch),
        size=sum(document.size for document in batch),
    )


def _problem(
    document: RawDocument, error: BrokenDocument, key: str | None, json_keys: tuple[str, ...]
) -> Problem:
    """Return a problem of a document (key None), of one of its texts, or of a file in it."""
    if key is not None and key not in json_keys:
        return Problem(key, None, str(error).removeprefix(f"{key}: "))
    reason = str(error).removeprefix(f"{document.place}: ")
    return Problem(document.path, document.line, reason, key)


class _Texts:
    """The documents of one key in a batch, as they come."""

    def __init__(self, task: TokenizingTask, tokenizer: Tokenizer) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._begin = np.array([tokenizer.bos] if task.prepend_bos else [], self._dtype)
        self._end = np.array([tokenizer.eod] if task.append_eod else [], self._dtype)
        self._tokens: list[np.ndarray] = [np.zeros(0, self._dtype)]
        self._context: list[int] = []  # tokens of each before its text
        self._encoded: list[bytes] = []
        self._bytes: list[int] = []
        self._empty = self._short = 0

    def add(self, text: str, prompt: str) -> None:
        ids = self._tokenizer.encode_array(text)
        if not ids.size:
            self._empty += 1
            return
        before = [self._begin, *([self._tokenizer.encode_array(prompt)] if prompt else [])]
        parts = [*before, ids, self._end]
        ids = np.concatenate(parts, dtype=self._dtype, casting="unsafe")  # the ids fit
        if ids.size < self._task.min_tokens:
            self._short += 1
            return
        self._tokens.append(ids)
        self._context.append(sum(map(len, before)))
        encoded = [part.encode("utf-8") for part in (prompt, text) if part]
        self._encoded.append(b"\xff".join(encoded))  # a byte that is in no text
        self._bytes.append(sum(map(len, encoded)))

    def result(self) -> KeyResult:
        lengths = np.array([len(ids) for ids in self._tokens[1:]], dtype=np.int64)
        hashed = np.empty(len(lengths), HASHED)
        hashed["hash"] = text_hashes(self._encoded)
        hashed["bytes"] = self._bytes
        tokens, counts = np.concatenate(self._tokens), None
        if self._task.masks_loss:
            firsts = np.cumsum(lengths) - lengths + np.array(self._context, np.int64)
            counts = np.arange(len(tokens)) >= np.repeat(firsts, lengths)
        return KeyResult(tokens, lengths, hashed, counts, self._empty, self._short)
