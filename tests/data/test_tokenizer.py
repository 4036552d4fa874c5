"""Every tokenizer gives back every text, and counts its bytes exactly."""

import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from megalong.data.tokenizers.tokenizer import ByteTokenizer, build_tokenizer
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


def test_round_trip_of_random_text(tokenizer):
    draw = random.Random(7)
    alphabet = [*" \t\n\r_a(\u2581\0", "\u00e9", "\U0001f600", "    ", "self", "\n    "]
    for _ in range(200):
        text = "".join(draw.choices(alphabet, k=40))
        text += "".join(chr(draw.randrange(0xD800)) for _ in range(10))
        check_exact(tokenizer, text)


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


def test_half_a_character_decodes_to_the_replacement_character():
    assert ByteTokenizer().decode("\u00e9".encode()[:1]) == "\ufffd"


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
