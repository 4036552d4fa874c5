"""A sample of the input's texts: its beginning, and places all over it."""

from __future__ import annotations

import bisect
import itertools
import os
import random
from collections.abc import Iterator

from megalong.data.formats import raw_documents, raw_documents_from, texts
from megalong.data.text.documents import BrokenDocument, RawDocument, Reading
from megalong.data.text.files import content_files

_LONGEST = 1 << 18  # characters of a text
_PLACES = 48


def sample_texts(files: list[str], reading: Reading, max_bytes: int) -> Iterator[tuple[str, str]]:
    """Yields texts, each with the name of its place: about max_bytes / 2 from the beginning, and as
    much from places drawn evenly over the files' bytes; of a long text a stretch. The same ones
    whenever the files are the same. Documents that are broken are not in it."""
    if not files:  # an empty partition
        return
    draw = random.Random(0)
    begin = itertools.chain.from_iterable(_documents(file, reading) for file in files)
    yield from _stretches(begin, reading, max_bytes // 2, draw)
    sizes = [sum(map(os.path.getsize, content_files(file))) for file in files]
    ends = list(itertools.accumulate(sizes))
    for _ in range(_PLACES if ends[-1] > max_bytes // 2 else 0):
        place = draw.randrange(ends[-1])
        i = bisect.bisect_right(ends, place)
        share = 1 - (ends[i] - place) / sizes[i]
        documents = raw_documents_from(files[i], reading, share)
        yield from _stretches(documents, reading, max_bytes // (2 * _PLACES), draw)


def _documents(file: str, reading: Reading) -> Iterator[RawDocument]:
    if reading.documents == "repository":  # which may be long: its files
        return raw_documents_from(file, reading, 0.0)
    return raw_documents(file, reading, lambda line: None)


def _stretches(
    documents: Iterator[RawDocument], reading: Reading, max_bytes: int, draw: random.Random
) -> Iterator[tuple[str, str]]:
    size, longest = 0, min(max_bytes, _LONGEST)
    for document in documents:
        try:
            values = texts(document, reading).values()
        except BrokenDocument:
            values = ()
        for text in values:
            if isinstance(text, str):
                start = draw.randrange(max(len(text) - longest, 0) + 1)
                stretch = text[start : start + longest]
                size += len(stretch.encode("utf-8"))
                yield document.place, stretch
        if size >= max_bytes:
            return
