"""Processes that prove the fast library, and make tokens with it or with the usual one."""

import os
import signal

import numpy as np
import pytest

from megalong.data.preprocessing.tokenizing import TokenizingTask, Workers
from megalong.data.text import json_lines
from megalong.data.text.documents import RawDocument, Reading
from megalong.data.tokenizers.backend import FastTokenizer, proven
from megalong.data.tokenizers.tokenizer import ByteTokenizer
from megalong.errors import UserError

TASK = TokenizingTask("ByteTokenizer", None, Reading(), append_eod=True)
TEXTS = ["one", "two", "three", "two and a half", "five"]


class Shifted:
    """An encoder with other ids for texts with a word. `kill`: instead it dies of them."""

    def __init__(self, word: str, kill: bool = False) -> None:
        self.word, self.kill = word, kill

    def __call__(self, text: str) -> np.ndarray:
        if self.word in text and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = np.frombuffer(text.encode(), np.uint8)
        return ids[::-1] if self.word in text else ids

    def forget(self) -> None:
        pass


class Bytes(ByteTokenizer):
    """One that says that there is a faster library for it."""

    def __init__(self, encoder: Shifted) -> None:
        super().__init__()
        self.encoder = encoder

    def fast_encoder(self) -> Shifted:
        return self.encoder


def batches():
    for i, text in enumerate(TEXTS):
        line = b'{"text": "%s"}\n' % text.encode()
        yield [RawDocument(json_lines.NAME, "a.jsonl", i + 1, line, None, len(line))], i


@pytest.mark.parametrize("number", [1, 3])
def test_what_differs_is_told_in_order_and_the_usual_tokens_are_made(number, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(documents[0].data for documents, _ in batches()))
    usual = Bytes(Shifted("two"))
    fast, said = FastTokenizer(usual), []
    with Workers(TASK, fast, number) as workers:
        assert list(workers.agree(TEXTS)) == [True, False, True, False, True]
        kept = proven(fast, "auto", [str(file)], Reading(), said.append, workers.agree)
        assert kept is usual
        results = list(workers.tokenized(batches(), kept))
        others = list(workers.tokenized(batches(), fast))
    assert said == [
        "tokenizer backend: the usual library; gigatoken gives other ids than the usual library for"
        f" {file}:2"
    ]
    assert [end for end, _ in results] == list(range(len(TEXTS)))
    for text, (_, result), (_, other) in zip(TEXTS, results, others, strict=True):
        expected = [*text.encode(), usual.eod]
        assert result.keys["text"].tokens.tolist() == expected
        assert (other.keys["text"].tokens.tolist() == expected) == ("two" not in text)


def test_a_worker_that_dies_of_the_proof_is_told():
    with (
        Workers(TASK, FastTokenizer(Bytes(Shifted("three", kill=True))), 2) as workers,
        pytest.raises(UserError, match="a tokenizing worker died"),
    ):
        list(workers.agree(TEXTS))


@pytest.mark.parametrize("set_before", [None, "glibc.malloc.arena_max=2"])
def test_workers_have_large_pages_and_this_process_keeps_its_settings(set_before, monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if set_before:
        monkeypatch.setenv("GLIBC_TUNABLES", set_before)
    with Workers(TASK, ByteTokenizer(), 2) as workers:
        assert os.environ.get("GLIBC_TUNABLES") == set_before
        seen = {workers._pool.submit(os.getenv, "GLIBC_TUNABLES").result() for _ in range(4)}
    assert seen == {set_before or "glibc.malloc.hugetlb=1"}
