"""Several outputs of preprocessing made one, as if one run had written it."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from megalong import __version__
from megalong.data import loss_mask
from megalong.data.indexed import SUFFIXES, Pair
from megalong.data.preprocessing.unfinished import Unfinished
from megalong.data.preprocessing.writer import (
    HASHED,
    HASHES,
    INPUTS,
    LISTED,
    SKIPPED,
    KeyResult,
    KeySummary,
    Output,
    refuse_existing,
)
from megalong.utils.errors import UserError, counted

PART_BYTES = 1 << 30
_CHUNK_TOKENS, _CHUNK_DOCUMENTS = 1 << 23, 1 << 18
# What all inputs must have in common, as their sidecars say it; not known: None.
_COMMON = (
    "tokenizer_type", "tokenizer_sha256", "vocab_size", "eod", "append_eod", "prepend_bos",
    "min_tokens", "deduplicate",
)  # fmt: skip
# All that they say of that, in their order.
_MADE = (
    "json_key", "prompt_key", "tokenizer_type", "tokenizer_model", *_COMMON[1:], "partition",
    "files_cut_short", "files_left_out", "megalong", "version",
)  # fmt: skip


def find_prefixes(inputs: list[str]) -> list[str]:
    """The prefixes that prefixes and glob patterns of prefixes name, in this order, sorted inside a
    pattern. Raises UserError: none, or one that is named twice."""
    prefixes = []
    for name in inputs:
        found = sorted(path.removesuffix(".idx") for path in glob.glob(name + ".idx"))
        if os.path.exists(name + ".idx"):
            found = [name]
        if not found:
            raise UserError(
                f"--input {name}: no file {name}.idx; give what tools/preprocess_data.py printed,"
                " PREFIX_KEY_document"
            )
        prefixes += found
    for prefix in prefixes:
        if prefixes.count(prefix) > 1:
            raise UserError(f"--input {prefix}: named twice")
    return prefixes


def merge(prefixes: list[str], prefix: str, *, overwrite: bool = False, progress: tqdm) -> dict:
    """Writes the documents of outputs, one output after the other, as PREFIX.bin, .idx and .json.

    Where one of them has a loss mask the outcome has one, by which all tokens of the others count.
    Repeated texts are known where all inputs have the .hashes of partitions; they are left out if
    that was done in each. Goes on where it was killed. progress: counts bytes.
    Returns the new description. Raises UserError for inputs that are damaged, or not made in the
    same way, and for partitions that are not complete.
    """
    if os.path.realpath(prefix) in map(os.path.realpath, prefixes):
        raise UserError(f"--output-prefix {prefix}: is one of the inputs: choose another name")
    sources = [_open(name) for name in prefixes]
    common = _common(sources)
    _check_partitions(sources, progress)
    identity = {"--input": [_state(source.prefix) for source in sources], "megalong": __version__}
    with Unfinished(prefix, identity, overwrite=overwrite) as job:
        if not job.naming:
            refuse_existing([prefix], overwrite)
            _copy(sources, prefix, common, job, progress)
        job.give_names()
    with open(prefix + ".json", encoding="utf-8") as file:
        return json.load(file)


def _copy(sources: list[Pair], prefix: str, common: dict, job: Unfinished, progress: tqdm) -> None:
    hashed = all(os.path.isfile(source.prefix + HASHES) for source in sources)
    if job.progress:
        summary = KeySummary(**job.progress["summary"])
        first, begin = job.progress["place"]
    else:
        summary, first, begin = KeySummary(prefix), 0, 0
        summary.deduplicate = bool(common["deduplicate"] and hashed)
    masks_loss = any(source.masks_loss for source in sources)
    output = Output(job, summary, sources[0].index.dtype, keep_hashes=False, masks_loss=masks_loss)
    inputs = job.file("inputs.jsonl")
    unnoted = 0
    progress.update(output.size)
    for number in range(first, len(sources)):
        source = sources[number]
        for chunk in _chunks(source, begin if number == first else 0, hashed):
            part, end = chunk
            output.add_part(part)
            progress.update(part.tokens.nbytes)
            unnoted += part.tokens.nbytes
            if unnoted >= PART_BYTES:
                _note(job, summary, (number, end))
                unnoted = 0
        _add_counts(source, output, hashed)
        for line in _lines(source, "inputs", INPUTS):
            inputs.write(json.dumps(line).encode() + b"\n")
        _note(job, summary, (number + 1, 0))
    descriptions = [source.description for source in sources]
    left_out: Counter = Counter()
    for there in descriptions:
        left_out.update(there.get("files_left_out", {}))
    description = common | {
        "files_cut_short": sum(there.get("files_cut_short", 0) for there in descriptions),
        "files_left_out": dict(left_out),
        "megalong": __version__,
    }
    if not hashed and len(sources) > 1:
        description |= {"repeats": None, "deduplicate": False}
    output.count_repeats()
    job.plan_names(*output.finish(description, inputs.path))


def _note(job: Unfinished, summary: KeySummary, place: tuple[int, int]) -> None:
    job.finish_part({"summary": dataclasses.asdict(summary), "place": place})


def _add_counts(source: Pair, output: Output, hashed: bool) -> None:
    """What was left out of a source, and is not among its documents."""
    summary, description = output.summary, source.description
    left_out = description.get("left_out", {})
    summary.empty += left_out.get("empty", 0)
    summary.short += left_out.get("short", 0)
    broken = summary.broken + left_out.get("broken", 0)
    for problem in _lines(source, "skipped", SKIPPED):
        output.skip(problem)
    summary.broken = broken
    if not hashed:
        summary.bytes += description.get("bytes", 0)
    if description.get("deduplicate"):
        repeats = description.get("repeats") or {"documents": 0, "tokens": 0}
        summary.repeats += repeats["documents"]
        summary.repeated_tokens += repeats["tokens"]


def _chunks(source: Pair, begin: int, hashed: bool) -> Iterator[tuple[KeyResult, int]]:
    """The documents from `begin` on, some at a time, and the number of the document behind them."""
    lengths = source.index.sequence_lengths
    if not len(lengths):
        return
    token = int(lengths[:begin].sum(dtype=np.int64))
    size = os.path.getsize(source.prefix + ".bin")
    tokens = np.memmap(source.prefix + ".bin", source.index.dtype, "r") if size else np.zeros(0)
    hashes = np.memmap(source.prefix + HASHES, HASHED, "r") if hashed else None
    masks = None
    if source.masks_loss and size:
        masks = np.memmap(source.prefix + loss_mask.SUFFIX, np.uint8, "r")
    while begin < len(lengths):
        ends = np.cumsum(lengths[begin : begin + _CHUNK_DOCUMENTS], dtype=np.int64)
        count = max(int(np.searchsorted(ends, _CHUNK_TOKENS, side="right")), 1)
        end, stop = begin + count, token + int(ends[count - 1])
        texts = None if hashes is None else np.array(hashes[begin:end])
        chunk = np.array(lengths[begin:end], np.int64)
        counts = None if masks is None else masks[token:stop] != 0
        yield KeyResult(tokens[token:stop], chunk, texts, counts), end
        begin, token = end, stop


def _open(prefix: str) -> Pair:
    missing = [prefix + suffix for suffix in SUFFIXES if not os.path.isfile(prefix + suffix)]
    if missing:
        raise UserError(
            f"--input {prefix}: no file {missing[0]}; only what tools/preprocess_data.py has"
            " written can be merged"
        )
    pair = Pair.open(prefix, f"--input {prefix}")
    count = len(pair.index.sequence_lengths)
    if len(pair.index.first_sequence) != count + 1:
        raise UserError(f"{prefix}.idx: documents of several sequences, which are not of megalong")
    hashes = prefix + HASHES
    if os.path.isfile(hashes) and os.path.getsize(hashes) != count * HASHED.itemsize:
        raise UserError(f"{hashes}: not of {prefix}.idx, or cut short")
    return pair


def _common(sources: list[Pair]) -> dict:
    """What the sidecars agree in. Raises UserError where they do not."""
    first = sources[0]
    for source in sources:
        dtypes = source.index.dtype, first.index.dtype
        if dtypes[0] != dtypes[1]:
            raise UserError(
                f"--input {source.prefix}: tokens are {dtypes[0]}, those of {first.prefix}"
                f" {dtypes[1]}"
            )
        for name in _COMMON:
            here, there = source.description.get(name), first.description.get(name)
            if here != there and (name != "tokenizer_sha256" or None not in (here, there)):
                raise UserError(
                    f"--input {source.prefix}: made with {name} {_words(here)}, and {first.prefix}"
                    f" with {_words(there)}"
                )
    found = {}
    for name in _MADE:
        values = [source.description.get(name) for source in sources]
        found[name] = values[0] if values.count(values[0]) == len(values) else None
    return found | {"partition": None}


def _check_partitions(sources: list[Pair], progress: tqdm) -> None:
    """Raises UserError where a partition is not there; says so where they are not in order."""
    shares: dict[tuple[str, int], dict[int, Pair]] = {}
    for source in sources:
        share = source.description.get("partition")
        if share:
            there = shares.setdefault((share["of"], share["count"]), {})
            if share["number"] in there:
                raise UserError(
                    f"--input {source.prefix}: --partition {share['number']}/{share['count']} of"
                    " its input is there already"
                )
            there[share["number"]] = source
    for (of, count), there in shares.items():
        missing = sorted({*range(1, count + 1)} - {*there})
        if missing:
            others = [
                source
                for (other, parts), found in shares.items()
                if len(found) < parts  # a complete one is not to blame
                for number, source in found.items()
                if other != of and parts == count and number in missing
            ]
            if others:
                one = next(iter(there.values()))
                raise UserError(
                    f"--input {others[0].prefix}: {_share(others[0])}, but {one.prefix} is"
                    f" {_share(one)} with other names or sizes: make them of the same files"
                )
            raise UserError(
                f"--input: {counted(len(missing), 'partition')} of {count} missing: "
                + ", ".join(f"{number}/{count}" for number in missing[:10])
            )
        if [*there] != sorted(there):
            progress.write("partitions are merged in the order of --input", file=sys.stderr)


def _share(source: Pair) -> str:
    share = source.description["partition"]
    size = f"{counted(share['files'], 'file')}, {share['bytes']:,} bytes"
    return f"--partition {share['number']}/{share['count']} of {size}"


def _lines(source: Pair, name: str, suffix: str) -> Iterator[dict]:
    """A list of a sidecar, or the file in which the whole of it is."""
    listed = source.description.get(name, [])
    if len(listed) == LISTED and os.path.isfile(source.prefix + suffix):
        with open(source.prefix + suffix, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    else:
        yield from listed


def _state(prefix: str) -> str:
    """A prefix, and what tells that its files are others."""
    masks = [loss_mask.SUFFIX] if os.path.isfile(prefix + loss_mask.SUFFIX) else []
    stats = [os.stat(prefix + suffix) for suffix in (*SUFFIXES, *masks)]
    return " ".join([prefix, *(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)])


def _words(value: object) -> str:
    return "an unknown one" if value is None else str(value)
