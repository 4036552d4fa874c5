"""The fast library is used where it gives the usual one's ids, and only there."""

import dataclasses
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from megalong.data.preprocessing.inputs import partition
from megalong.data.preprocessing.preprocess import preprocess
from megalong.data.preprocessing.tokenizing import TokenizingTask
from megalong.data.text.documents import Reading
from megalong.data.tokenizers import backend
from megalong.data.tokenizers.backend import FastTokenizer, choose_backend
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from megalong.utils.machine import resident_bytes
from megalong.utils.progress import progress_bar
from tests.data.test_tokenizer import TEXTS


@pytest.fixture
def usual(tokenizer_model):
    return build_tokenizer("SentencePieceTokenizer", tokenizer_model)


def test_the_same_ids_faster(usual, corpus, corpus_texts):
    pytest.importorskip("gigatoken")
    said = []
    fast = choose_backend(usual, "fast", [str(corpus)], Reading(), said.append)
    assert isinstance(fast, FastTokenizer)
    [line] = said
    assert line.startswith("tokenizer backend: gigatoken, which gives the usual library's ids for ")
    for tokenizer in (fast, pickle.loads(pickle.dumps(fast))):
        assert (tokenizer.eod, tokenizer.vocab_size) == (usual.eod, usual.vocab_size)
        for text in [*TEXTS, *corpus_texts[:20]]:
            assert tokenizer.encode(text) == usual.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UnicodeEncodeError):
        fast.encode("\ud83d")


def test_an_empty_partition(tokenizer_model, tmp_path):
    pytest.importorskip("gigatoken")
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for file in files:
        Path(file).write_text("text")
    share, number = partition(files, "2/3", lambda line: None)
    assert share == []
    task = TokenizingTask("SentencePieceTokenizer", tokenizer_model, Reading(), append_eod=True)
    task = dataclasses.replace(task, backend="fast")
    bar = progress_bar(0, "B", "", enabled=False)
    made = preprocess(share, str(tmp_path / "out"), task, partition=number, progress=bar)
    assert made.keys["text"].documents == 0


def grown_by_new_words(usual) -> int:
    """Resident bytes that encoding words adds at the most, of which the library would remember 200
    MB."""
    backend._REMEMBERED = 48 << 20
    fast = FastTokenizer(usual)
    draw, most, begun_with = np.random.default_rng(0), 0, resident_bytes()
    for _ in range(24):
        words = draw.integers(ord("a"), ord("z"), (100_000, 20), np.uint8)
        words[:, 0] = ord(" ")
        fast.encode_array(words.tobytes().decode())
        most = max(most, resident_bytes() - begun_with)
    return most


def test_memory_does_not_grow_with_the_input(usual):
    pytest.importorskip("gigatoken")
    # In a process of its own: what is resident hangs on what else a process has done.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(grown_by_new_words, usual).result() < 128 << 20


def test_other_ids_are_never_used(usual, corpus, corpus_texts, monkeypatch):
    late = next(text for text in corpus_texts[3:] if len(text) > 100)

    class Wrong:
        def __call__(self, text: str) -> np.ndarray:
            return usual.encode_array(text) + (len(text) > 100 and text[:100] == late[:100])

        def forget(self) -> None:
            pass

    monkeypatch.setattr(usual, "fast_encoder", Wrong)
    said = []
    assert choose_backend(usual, "auto", [str(corpus)], Reading(), said.append) is usual
    [line] = said
    assert line.startswith("tokenizer backend: the usual library; gigatoken gives other ids than")
    assert str(corpus) in line
    with pytest.raises(UserError, match="--tokenizer-backend fast: gigatoken gives other ids"):
        choose_backend(usual, "fast", [str(corpus)], Reading(), said.append)


def test_without_the_library_the_usual_one_is_used_and_said(usual, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    said = []
    assert choose_backend(usual, "auto", [str(corpus)], Reading(), said.append) is usual
    assert said == [
        "tokenizer backend: the usual library; a faster one is gigatoken: pip install gigatoken"
    ]
    assert choose_backend(usual, "usual", [str(corpus)], Reading(), pytest.fail) is usual


def test_a_failure_of_the_library_is_a_difference(usual):
    class Panic(BaseException):
        """As those of Rust are."""

    def fails(text: str) -> np.ndarray:
        raise Panic

    fails.forget = lambda: None
    usual.fast_encoder = lambda: fails
    assert not FastTokenizer(usual).agrees("text")
