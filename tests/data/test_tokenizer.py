"""Every tokenizer gives back every text, and counts its bytes exactly."""

import gzip
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megalong.data.tokenizers.sentencepiece_tokenizer import (
    SentencePieceTokenizer,
    sample_chunks,
    train_sentencepiece,
)
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError

TEXTS = [
    "",
    " ",
    "Hello, world",
    "  two before, three behind   ",
    "def f(x):\n    if x:\n\t\treturn 1\n\n\n        pass\n",
    "\n" * 50 + " " * 333 + "\t" * 77,
    "line\r\nline\r\n\r\r\n",
    "a\0b\0",
    "caf\u00e9 e\u0301 \u4f60\u597d \u0645\u0631 \U0001f600\U0001f468\u200d\U0001f469",
    "\u2581 \u2581\u2581x\u2585\u2047 \u00a0\u3000\u2028",
    "\ufeff\ufffd\uffff\U0010ffff\x85\x7f",
    "<eod> </s> <unk> <0x0A> <|endoftext|>",
]


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request):
    if request.param == "bytes":
        return build_tokenizer("ByteTokenizer")
    model = request.getfixturevalue("tokenizer_model")
    return build_tokenizer("SentencePieceTokenizer", model)


def check_exact(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_is_exact(tokenizer, text):
    check_exact(tokenizer, text)


def test_a_mask_token_is_added_behind_all_others(tokenizer):
    masked = tokenizer.with_mask()
    assert tokenizer.mask is None and masked.mask == tokenizer.vocab_size == masked.vocab_size - 1
    assert masked.with_mask() is masked and masked.eod == tokenizer.eod
    text = "x <mask> y"
    assert masked.encode(text) == tokenizer.encode(text)
    assert masked.decode([*masked.encode(text), masked.mask]) == text
    assert masked.token_bytes()[masked.mask] == 0


def test_a_fingerprint_is_of_the_content(tokenizer, tokenizer_model, tmp_path):
    """Not of the file's place; and other scores, which cut texts otherwise, are another content."""
    known = build_tokenizer("SentencePieceTokenizer", tokenizer_model).fingerprint
    assert len(known) == 64 and (tokenizer.fingerprint == known) == (tokenizer.vocab_size == 1024)
    content = Path(tokenizer_model).read_bytes()
    (tmp_path / "copy.model").write_bytes(content)
    copy = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "copy.model"))
    assert copy.fingerprint == known
    copy._joins = lambda: b"other scores"
    del copy.fingerprint
    assert copy.fingerprint != known


def test_round_trip_of_source_code(tokenizer, corpus_texts):
    for text in corpus_texts[:20]:
        check_exact(tokenizer, text)


def test_cutting_long_texts_does_not_change_the_ids(tokenizer_model, corpus_texts):
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model)
    library = sentencepiece.SentencePieceProcessor(model_file=tokenizer_model)
    assert max(map(len, corpus_texts)) > 20_000
    for text in [*corpus_texts, " " * 10_000, "x" * 10_000, " x" * 10_000, "\n" * 9000 + " y"]:
        assert tokenizer.encode(text) == library.encode(text)


def test_special_tokens_stand_for_no_bytes(tokenizer):
    token_bytes = tokenizer.token_bytes()
    assert token_bytes.dtype == np.int32 and token_bytes.shape == (tokenizer.vocab_size,)
    assert token_bytes[tokenizer.eod] == 0
    assert tokenizer.decode([tokenizer.eod, *tokenizer.encode("x"), tokenizer.eod]) == "x"


def test_ids_out_of_range_are_refused(tokenizer):
    for wrong in (-100, tokenizer.vocab_size):
        with pytest.raises(IndexError):
            tokenizer.decode([wrong])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud83d")


def test_byte_tokenizer_is_bytes_and_eod():
    tokenizer = build_tokenizer("ByteTokenizer")
    assert tokenizer.vocab_size == 257 and tokenizer.eod == 256
    assert tokenizer.encode("a\n") == [97, 10]


def test_errors_name_the_flag(tmp_path):
    with pytest.raises(ValueError, match="--tokenizer-type Word"):
        build_tokenizer("Word")
    with pytest.raises(ValueError, match="needs --tokenizer-model"):
        build_tokenizer("SentencePieceTokenizer")
    with pytest.raises(UserError, match=r"--tokenizer-model .*missing\.model"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "missing.model"))
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"garbage\.model.*set --tokenizer-type SentencePiece"):
        build_tokenizer("HuggingFaceTokenizer", str(garbage))
    with pytest.raises(ValueError, match=r"garbage\.model: not a SentencePiece model"):
        build_tokenizer("SentencePieceTokenizer", str(garbage))
    with pytest.raises(UserError, match=r"a folder.*set --tokenizer-type HuggingFaceTokenizer"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path))


def test_a_model_that_is_not_lossless_is_pointed_out(tmp_path, tokenizer_model):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to train on", "more words"] * 20),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=17,
        minloglevel=2,
    )
    with pytest.warns(UserWarning, match="does not give every text back unchanged"):
        build_tokenizer("SentencePieceTokenizer", str(tmp_path / "lossy.model"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_tokenizer("SentencePieceTokenizer", tokenizer_model)


def test_without_transformers_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path))


TOOL = "tools/train_tokenizer.py"


def test_layout_of_code_becomes_few_tokens(tokenizer_model):
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model)
    for text, most in [("\n", 1), ("\n\n", 1), ("):\n", 1), ("        ", 1), ("\t\t", 1)]:
        assert len(tokenizer.encode(text)) <= most, text
    # New line and eight spaces: not one byte token and eight spaces.
    assert len(tokenizer.encode("\n        return self\n")) <= 6


def test_bytes_per_token(tokenizer_model, corpus_texts):
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model)
    size = sum(len(text.encode()) for text in corpus_texts)
    assert size / sum(len(tokenizer.encode(text)) for text in corpus_texts) > 2.4


def test_vocabulary_has_the_size_asked_for_and_an_eod(tokenizer_model):
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.eod == 1 and tokenizer.pieces[1] == b""
    assert sorted(tokenizer.pieces).count(b"") == 2  # unknown and eod
    assert {bytes([value]) for value in range(256)} <= set(tokenizer.pieces)


def test_same_input_same_model(tmp_path, corpus, tokenizer_model, run_tool):
    arguments = ("--input", corpus, "--output-prefix", tmp_path / "again", "--vocab-size", 1024)
    assert run_tool(TOOL, *arguments).returncode == 0
    with open(tokenizer_model, "rb") as file:
        assert (tmp_path / "again.model").read_bytes() == file.read()


def test_sample_is_bounded_reproducible_and_spread_over_the_input():
    texts = [f"line {i}\n" * 100 for i in range(1000)]
    size = sum(map(len, texts))
    sample = sample_chunks(texts, size // 10, seed=1)
    assert 0.95 * size / 10 < sum(map(len, sample)) <= size / 10
    assert sample == sample_chunks(texts, size // 10, seed=1)
    assert sample != sample_chunks(texts, size // 10, seed=2)
    numbers = [int(chunk.split(maxsplit=2)[1]) for chunk in sample]
    assert numbers == sorted(numbers)
    assert min(numbers) < 100 and max(numbers) >= 900
    assert "".join(sample_chunks(texts, size, seed=1)) == "".join(texts)


def test_long_lines_are_cut_not_dropped():
    text = "x" * 10_000 + "\n" + "y\n" * 5_000
    chunks = sample_chunks([text], 1 << 30, seed=1)
    assert "".join(chunks) == text and max(map(len, chunks)) <= 4096
    assert train_sentencepiece(["z" * 10_000], 270)  # far longer than the default limit


def test_inputs_of_every_kind_and_no_library_log(tmp_path, corpus, corpus_texts, run_tool):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.py").write_text(corpus_texts[0])
    with gzip.open(folder / "b.jsonl.gz", "wb") as file:
        file.write(corpus.read_bytes())
    with open(folder / "c.jsonl", "w") as file:
        file.write('{"text": 1}\nnot json\n' + "not json\n" * 200)
    done = run_tool(
        TOOL, "--input", folder, "--output-prefix", tmp_path / "new/t", "--vocab-size", 400
    )
    assert done.returncode == 0, done.stderr
    assert "new/t.model: 400 ids" in done.stdout
    assert "c.jsonl:1" in done.stderr and "c.jsonl:2" in done.stderr
    assert done.stderr.count("skipped") == 100 and "202 documents skipped" in done.stdout
    assert "trainer_interface" not in done.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.model"]


def test_errors(tmp_path, corpus, tokenizer_model, run_tool):
    def failure(*arguments) -> str:
        done = run_tool(TOOL, *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    new = ("--output-prefix", tmp_path / "t")
    assert "--input nothing" in failure("--input", "nothing", *new, "--vocab-size", 500)
    small = tmp_path / "small.txt"
    small.write_text("a few words\n")
    assert "supports at most" in failure("--input", small, *new, "--vocab-size", 5000)
    assert "--vocab-size 200" in failure("--input", corpus, *new, "--vocab-size", 200)
    for size in (0, -1):
        assert f"--vocab-size {size} must be" in failure(
            "--input", corpus, *new, "--vocab-size", size
        )
    nowhere = (
        "--output-prefix",
        "/sys/kernel/t",
        "--vocab-size",
        500,
    )  # also root cannot write there
    assert "--output-prefix /sys/kernel: no file can be made" in failure("--input", small, *nowhere)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "no text" in failure("--input", empty, *new, "--vocab-size", 500)
    existing = ("--output-prefix", tokenizer_model.removesuffix(".model"))
    assert "is there already" in failure("--input", corpus, *existing, "--vocab-size", 500)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "small.txt"]


def test_too_little_text_is_a_clear_error():
    with pytest.raises(ValueError, match="at most"):
        train_sentencepiece(["hello\n"], 5000)
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece([], 5000)
