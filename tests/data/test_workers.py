"""Processes that prove the fast library, and make tokens with it or with the usual one."""

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from megalong.data.preprocessing import preprocess as module
from megalong.data.preprocessing.tokenizing import PICKLED, TokenizingTask, Workers
from megalong.data.text import json_lines
from megalong.data.text.documents import RawDocument, Reading
from megalong.data.tokenizers.backend import FastTokenizer, proven
from megalong.data.tokenizers.tokenizer import ByteTokenizer
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

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
    with Workers(TASK, fast, number, tmp_path) as workers:
        assert (tmp_path / PICKLED).exists() == (number > 1)
        assert list(workers.agree(TEXTS)) == [True, False, True, False, True]
        kept = proven(fast, "auto", [str(file)], Reading(), said.append, workers.agree)
        assert kept is usual
        results = list(workers.tokenized(batches(), kept))
        others = list(workers.tokenized(batches(), fast))
    assert not (tmp_path / PICKLED).exists()
    assert said == [
        "tokenizer backend: the usual library; gigatoken gives other ids than the usual library for"
        f" {file}:2"
    ]
    assert [end for end, _ in results] == list(range(len(TEXTS)))
    for text, (_, result), (_, other) in zip(TEXTS, results, others, strict=True):
        expected = [*text.encode(), usual.eod]
        assert result.keys["text"].tokens.tolist() == expected
        assert (other.keys["text"].tokens.tolist() == expected) == ("two" not in text)


def test_a_worker_that_dies_of_the_proof_is_told_and_replaced(tmp_path, monkeypatch, capsys):
    file, bar = tmp_path / "a.jsonl", progress_bar(1, "B", "", enabled=False)
    file.write_bytes(b"".join(documents[0].data for documents, _ in batches()))
    usual = Bytes(Shifted("three", kill=True))
    monkeypatch.setattr(module, "build_tokenizer", lambda *_: usual)
    monkeypatch.setattr(module, "perhaps_fast", lambda usual, *_: FastTokenizer(usual))

    def tokens(backend: str) -> bytes:
        task = dataclasses.replace(TASK, backend=backend)
        prefix = tmp_path / backend
        module.preprocess([str(file)], str(prefix), task, workers=2, progress=bar)
        return Path(f"{prefix}_text_document.bin").read_bytes()

    made = tokens("auto")
    assert capsys.readouterr().err == (
        "tokenizer backend: the usual library; comparing gigatoken's ids, a tokenizing worker died"
        " (killed, or out of memory: try fewer --workers)\n"
    )
    expected = [[*text.encode(), usual.eod] for text in TEXTS]
    assert made == np.concatenate(expected).astype(np.uint16).tobytes()
    with pytest.raises(UserError, match=r"a tokenizing worker died.*nothing was written"):
        tokens("fast")
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_text_that_the_fast_library_fails_of_is_one_that_differs():
    class Panic(BaseException):
        """As those of Rust are."""

    def fails(text: str) -> np.ndarray:
        raise Panic if text else ValueError

    fast = FastTokenizer(Bytes(Shifted("two")))
    fast._encoder = fails
    assert not fast.agrees("") and not fast.agrees("text")


@pytest.mark.parametrize("set_before", [None, "glibc.malloc.arena_max=2"])
def test_workers_have_large_pages_and_this_process_keeps_its_settings(
    set_before, monkeypatch, tmp_path
):
    """Those of the fast library have."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if set_before:
        monkeypatch.setenv("GLIBC_TUNABLES", set_before)
    fast = FastTokenizer(Bytes(Shifted("two")))
    for tokenizer, pages in [(fast, "glibc.malloc.hugetlb=1"), (fast.usual, None)]:
        with Workers(TASK, tokenizer, 2, tmp_path) as workers:
            assert os.environ.get("GLIBC_TUNABLES") == set_before
            seen = {workers._pool.submit(os.getenv, "GLIBC_TUNABLES").result() for _ in range(4)}
        assert seen == {set_before or pages}
