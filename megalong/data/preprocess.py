"""Text files to .bin/.idx: reading, tokenizing in parallel, writing in input order.

The parent cuts files into batches of raw documents and writes what comes back; decoding, parsing
and tokenizing happen in workers. At most a few batches per worker are under way, so that memory
does not grow with the corpus, and results are taken in the order in which they were handed out.
"""

import collections
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megalong.data.documents import BrokenDocument, RawDocument, Remarks
from megalong.data.formats import raw_documents, texts
from megalong.data.tokenizer import Tokenizer, build_tokenizer
from megalong.data.writer import DocumentWriter, token_dtype
from megalong.errors import UserError
from megalong.wording import counted

BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 4096
BATCHES_PER_WORKER = 3
SIDECAR_VERSION = 1


@dataclass(frozen=True)
class TokenizingTask:
    """What a worker needs to know."""

    tokenizer_type: str
    tokenizer_model: str | None
    json_keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool = False


@dataclass
class KeyResult:
    """The documents of one key in a batch: tokens back to back, tokens and bytes of each text."""

    tokens: np.ndarray
    lengths: np.ndarray
    bytes: int
    empty: int


@dataclass
class BatchResult:
    keys: dict[str, KeyResult]
    problems: list[str]
    cut_short: int  # files whose rest cannot be read
    size: int  # bytes on disk


@dataclass
class KeySummary:
    """What was written for one key. bytes: UTF-8 bytes of the texts."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    empty: int = 0
    max_token_id: int = -1
    longest: int = 0


@dataclass
class Summary:
    keys: dict[str, KeySummary]
    files: int
    skipped: int = 0
    cut_short: int = 0  # files whose rest could not be read
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
    progress: tqdm,
) -> Summary:
    """Tokenizes files into one .bin/.idx/.json per key, named by output_prefix().

    Documents keep the order of `files` and of the lines in them, whatever `workers` is. A broken
    document is named above the progress bar, counted and left out; with strict it is a UserError
    (nothing is written then). A text without tokens is left out and counted as empty.
    Raises UserError where nothing is left to write, where DocumentWriter does, and where a worker
    dies (killed, or out of memory).
    """
    start = time.monotonic()
    if len(set(task.json_keys)) != len(task.json_keys):
        raise UserError(f"--json-keys {' '.join(task.json_keys)}: a key is named twice")
    tokenizer = build_tokenizer(task.tokenizer_type, task.tokenizer_model)
    if task.prepend_bos and tokenizer.bos is None:
        raise UserError("--prepend-bos: this tokenizer has no beginning-of-text token")
    dtype = token_dtype(tokenizer.vocab_size)
    summary = Summary(
        {key: KeySummary(output_prefix(prefix, key)) for key in task.json_keys}, len(files)
    )
    remarks = Remarks(progress)
    with contextlib.ExitStack() as stack:
        writers = {
            key: stack.enter_context(DocumentWriter(part.prefix, dtype, overwrite=overwrite))
            for key, part in summary.keys.items()
        }
        results = _tokenize(_batches(files, task, remarks), task, tokenizer, workers)
        # Closed before the writers are: the workers must be gone when an error is reported.
        for result in stack.enter_context(contextlib.closing(results)):
            summary.cut_short += result.cut_short
            for problem in result.problems:
                if strict:
                    raise UserError(f"{problem} (--strict: nothing was written)")
                remarks.skip(problem)
            for key, part in result.keys.items():
                writers[key].add(part.tokens, part.lengths)
                _count(part, summary.keys[key])
            first = summary.keys[task.json_keys[0]]
            rate = first.documents / max(time.monotonic() - start, 1e-9)
            progress.set_postfix_str(f"{first.documents:,} documents, {rate:,.0f}/s", refresh=False)
            progress.update(result.size)
        summary.skipped = remarks.skipped
        for key, part in summary.keys.items():
            if not part.documents:
                raise UserError(_nothing_found(key, part, summary))
        for key, part in summary.keys.items():
            writers[key].commit(_description(part, task, tokenizer))
    summary.seconds = time.monotonic() - start
    return summary


def _batches(
    files: list[str], task: TokenizingTask, remarks: Remarks
) -> Iterator[list[RawDocument]]:
    """Groups documents, across files too, into batches of about BATCH_BYTES."""
    batch, size = [], 0
    for file in files:
        for document in raw_documents(file, task.json_keys, remarks.say):
            batch.append(document)
            size += document.size if document.data is None else len(document.data)
            if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _tokenize(
    batches: Iterator[list[RawDocument]], task: TokenizingTask, tokenizer: Tokenizer, workers: int
) -> Iterator[BatchResult]:
    """Yields the result of every batch, in order."""
    if workers == 1:
        for batch in batches:
            yield tokenize_batch(batch, task, tokenizer)
        return
    # Spawned, not forked: the caller may have threads. A worker is given the tokenizer as it is and
    # imports neither Transformers nor torch, which would take hundreds of MB in each.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (task, tokenizer)
    )
    under_way = collections.deque()
    try:
        for batch in batches:
            under_way.append((batch[0].place, pool.submit(_tokenize_in_worker, batch)))
            if len(under_way) == BATCHES_PER_WORKER * workers:
                yield under_way[0][1].result()
                under_way.popleft()
        while under_way:
            yield under_way[0][1].result()
            under_way.popleft()
    except BrokenProcessPool:
        near = f" near {under_way[0][0]}" if under_way else ""
        raise UserError(
            f"a tokenizing worker died{near} (out of memory? try fewer --workers); "
            "nothing was written"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[TokenizingTask, Tokenizer] | None = None  # set once in every worker process


def _start_worker(task: TokenizingTask, tokenizer: Tokenizer) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = task, tokenizer


def _exit_with_parent() -> None:
    """A killed parent cannot stop its workers, and they would wait for it forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize_in_worker(batch: list[RawDocument]) -> BatchResult:
    return tokenize_batch(batch, *_worker)


def tokenize_batch(
    batch: list[RawDocument], task: TokenizingTask, tokenizer: Tokenizer
) -> BatchResult:
    """Decodes, parses and tokenizes raw documents."""
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = {key: [np.zeros(0, dtype)] for key in task.json_keys}
    sizes = dict.fromkeys(task.json_keys, 0)
    empty = dict.fromkeys(task.json_keys, 0)
    problems: list[str] = []
    cut_short = sum(document.error is not None for document in batch)
    for document in batch:
        try:
            values = texts(document, task.json_keys)
        except BrokenDocument as error:
            problems.append(str(error))
            continue
        for key, text in values.items():
            if isinstance(text, BrokenDocument):
                problems.append(str(text))
                continue
            ids = tokenizer.encode(text)
            if not ids:
                empty[key] += 1
                continue
            if task.prepend_bos:
                ids.insert(0, tokenizer.bos)
            if task.append_eod:
                ids.append(tokenizer.eod)
            tokens[key].append(np.array(ids, dtype=dtype))
            sizes[key] += len(text.encode("utf-8"))
    results = {
        key: KeyResult(
            np.concatenate(tokens[key]),
            np.array([len(ids) for ids in tokens[key][1:]], dtype=np.int64),
            sizes[key],
            empty[key],
        )
        for key in task.json_keys
    }
    size = sum(document.size for document in batch)
    return BatchResult(results, problems, cut_short, size)


def _count(part: KeyResult, total: KeySummary) -> None:
    total.documents += len(part.lengths)
    total.tokens += part.tokens.size
    total.bytes += part.bytes
    total.empty += part.empty
    if part.tokens.size:
        total.max_token_id = max(total.max_token_id, int(part.tokens.max()))
        total.longest = max(total.longest, int(part.lengths.max()))


def _nothing_found(key: str, part: KeySummary, summary: Summary) -> str:
    hint = "; --json-keys names the keys of the texts" if summary.skipped else ""
    return (
        f"--input: no document with text under the key {key!r} in"
        f" {counted(summary.files, 'file')} ({summary.skipped} skipped, {part.empty} empty);"
        f" nothing was written{hint}"
    )


def _description(part: KeySummary, task: TokenizingTask, tokenizer: Tokenizer) -> dict:
    """The sidecar PREFIX.json, besides the counts that the writer adds."""
    return {
        "bytes": part.bytes,
        "longest_document": part.longest,
        "max_token_id": part.max_token_id,
        "tokenizer_type": task.tokenizer_type,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "append_eod": task.append_eod,
        "prepend_bos": task.prepend_bos,
        "version": SIDECAR_VERSION,
    }
