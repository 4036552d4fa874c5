"""The fast library is used where it gives the usual one's ids, and only there."""

import json
import pickle
import sys

import numpy as np
import pytest

from megalong.data.text.documents import Reading
from megalong.data.text.sample import sample_texts
from megalong.data.tokenizers import backend
from megalong.data.tokenizers.backend import FastTokenizer, with_backend
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.errors import UserError
from tests.data.test_tokenizer import TEXTS


@pytest.fixture
def usual(tokenizer_model):
    return build_tokenizer("SentencePieceTokenizer", tokenizer_model)


def test_the_same_ids_faster(usual, corpus, corpus_texts):
    pytest.importorskip("gigatoken")
    said = []
    fast = with_backend(usual, "fast", [str(corpus)], Reading(), said.append)
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


def test_what_the_library_remembers_is_let_go(usual, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(backend, "_LOOKED_AT_AFTER", 10)
    monkeypatch.setattr(backend, "_REMEMBERED", -1)
    fast = FastTokenizer(usual)
    encoders = set()
    for _ in range(4):
        assert fast.encode("some words") == usual.encode("some words")
        encoders.add(fast._encoder)
    assert len(encoders) == 4 - 1


def test_other_ids_are_never_used(usual, corpus, corpus_texts, monkeypatch):
    late = "".join(corpus_texts[-20:])  # behind the part of the sample that is the beginning

    def wrong(text: str) -> np.ndarray:
        return usual.encode_array(text) + (len(text) > 100 and text in late)

    monkeypatch.setattr(usual, "fast_encoder", lambda: wrong, raising=False)
    monkeypatch.setattr(backend, "_SAMPLE_BYTES", 1 << 19)
    said = []
    assert with_backend(usual, "auto", [str(corpus)], Reading(), said.append) is usual
    [line] = said
    assert line.startswith("tokenizer backend: the usual library; gigatoken gives other ids than")
    assert str(corpus) in line
    with pytest.raises(UserError, match="--tokenizer-backend fast: gigatoken gives other ids"):
        with_backend(usual, "fast", [str(corpus)], Reading(), said.append)


def test_without_the_library_the_usual_one_is_used_and_said(usual, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    said = []
    assert with_backend(usual, "auto", [str(corpus)], Reading(), said.append) is usual
    assert said == [
        "tokenizer backend: the usual library; a faster one is gigatoken: pip install gigatoken"
    ]
    assert with_backend(usual, "usual", [str(corpus)], Reading(), pytest.fail) is usual


def test_the_sample_is_of_the_beginning_and_of_all_files(tmp_path):
    for i in range(4):
        rows = (json.dumps({"text": f"{i} {n} " + "x" * 500}) for n in range(2000))
        (tmp_path / f"{i}.jsonl").write_text("\n".join(rows))
    (tmp_path / "0.jsonl").write_text("broken\n" + (tmp_path / "0.jsonl").read_text())
    files = [str(tmp_path / f"{i}.jsonl") for i in range(4)]
    texts = [text for _, text in sample_texts(files, Reading(), 400_000)]
    assert texts[0].startswith("0 0 ") and 300_000 < sum(map(len, texts)) < 500_000
    assert {text[0] for text in texts} == set("0123")
    assert len({text.split()[1] for text in texts if text[0] == "3"}) > 20
    assert texts == [text for _, text in sample_texts(files, Reading(), 400_000)]
