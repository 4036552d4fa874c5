"""The exported tokenizer is the training tokenizer: same ids, same text."""

import io
import json
import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megalong.data.tokenizers.sentencepiece_tokenizer import train_sentencepiece
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.hf.tokenizer_files import export_tokenizer, plain_ids, tokenizer_of_export

LIBRARY = sorted(Path(json.__file__).parent.parent.glob("*.py"))
NOISE = (32, 32, 9, 10, 97, 98, 0x2581, 0xE9, 0x3042, 0x1F600, 0)


@pytest.fixture(scope="module")
def texts():
    """Source code, and strings of any characters."""
    draw = random.Random(0)
    noise = [
        "".join(chr(draw.choice([*NOISE, draw.randrange(32, 0x2000)])) for _ in range(200))
        for _ in range(40)
    ]
    code = [path.read_text(encoding="utf-8", errors="ignore")[:20_000] for path in LIBRARY[:40]]
    return [*code, *noise, "<eod><unk></s><0x0A> <eod>", "", " "]


def sentencepiece_model(texts, **options):
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in texts[:20] for line in text.replace("\0", "").split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=700, num_threads=1,
        minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


LOSSLESS = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}


def check_same(kind, model, texts, folder):
    folder.mkdir()
    ours = export_tokenizer(kind, model, folder, 128)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.is_fast and len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.eod
    for text in texts:
        ids = plain_ids(theirs, text)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == text == ours.decode(ids)
        if not any(token in text for token in theirs.all_special_tokens):
            # As for fine-tuning: the text, and the end of document by its name.
            assert theirs(text + theirs.eos_token)["input_ids"] == [*ids, ours.eod]
    assert theirs.decode([*ids, ours.eod], skip_special_tokens=True) == texts[-1]
    assert theirs.model_max_length == 128
    assert len(theirs(texts[0], truncation=True)["input_ids"]) == 128
    return tokenizer_of_export(folder)


def test_bytes(texts, tmp_path):
    back = check_same("ByteTokenizer", None, texts, tmp_path / "hf")
    assert back == ("ByteTokenizer", None)
    special = AutoTokenizer.from_pretrained(tmp_path / "hf").special_tokens_map
    assert special == {"eos_token": "<eod>", "pad_token": "<eod>"}


@pytest.mark.parametrize("kind", ["ours", "unigram"])
def test_sentencepiece(kind, texts, tmp_path):
    file = tmp_path / "tokenizer.model"
    if kind == "ours":
        file.write_bytes(train_sentencepiece(texts[:20], 900))
    else:
        file.write_bytes(sentencepiece_model(texts, model_type="unigram", pad_id=3, **LOSSLESS))
    back, model = check_same("SentencePieceTokenizer", str(file), texts, tmp_path / "hf")
    assert back == "SentencePieceTokenizer" and Path(model).read_bytes() == file.read_bytes()
    special = AutoTokenizer.from_pretrained(tmp_path / "hf").special_tokens_map
    if kind == "ours":  # what padding is made of is no end of document, nor in any text
        assert special == {"eos_token": "<eod>", "unk_token": "<unk>", "pad_token": "<unk>"}
    else:
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        assert special == {**names, "pad_token": "<pad>"}


@pytest.mark.filterwarnings("ignore:.*does not give every text back")
def test_a_sentencepiece_model_that_changes_texts_gives_the_same_ids(texts, tmp_path):
    file = tmp_path / "nfkc.model"
    file.write_bytes(sentencepiece_model(texts, model_type="unigram"))  # NFKC, prefix, no bytes
    ours = export_tokenizer("SentencePieceTokenizer", str(file), tmp_path, 128)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts[:40]:
        text = text.replace("\u2581", "")
        assert plain_ids(theirs, text) == ours.encode(text)


def test_sentencepiece_models_without_a_fast_tokenizer_are_refused(texts, tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(sentencepiece_model(texts, model_type="char", hard_vocab_limit=False))
    with (
        pytest.warns(UserWarning, match="does not give every text back"),
        pytest.raises(ValueError, match="--no-tokenizer"),
    ):
        export_tokenizer("SentencePieceTokenizer", str(file), tmp_path, 128)


def test_a_folder_of_transformers_is_copied(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    export_tokenizer("ByteTokenizer", None, tmp_path / "a", 128)
    export_tokenizer("HuggingFaceTokenizer", str(tmp_path / "a"), tmp_path / "b", 256)
    one, other = (build_tokenizer("HuggingFaceTokenizer", str(tmp_path / x)) for x in "ab")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.model_max_length == 256 and theirs("a<eod>")["input_ids"] == [97, 256]
    assert one.encode("caf\u00e9\n") == other.encode("caf\u00e9\n") == list("caf\u00e9\n".encode())


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_texts_begin_as_those_of_the_training_did(kind, texts, tmp_path):
    """With and without a token before every text, whatever the tokenizer does by itself."""
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model(texts, model_type="bpe", **LOSSLESS)  # with <s> and </s>
    )
    model = tmp_path / "tokenizer.model"
    if kind == "HuggingFaceTokenizer":
        (tmp_path / "own").mkdir()
        own = tmp_path / "own"
        export_tokenizer("SentencePieceTokenizer", str(model), own, 128, prepend_bos=True)
        (tmp_path / "own" / "tokenizer.model").unlink()
        model = tmp_path / "own"
    for prepend_bos in (False, True):
        folder = tmp_path / f"out{prepend_bos}"
        folder.mkdir()
        ours = export_tokenizer(kind, str(model), folder, 128, prepend_bos)
        theirs = AutoTokenizer.from_pretrained(folder)
        begin = [ours.bos] if prepend_bos else []
        for text in texts[:3]:
            assert theirs(text)["input_ids"] == begin + ours.encode(text)
            assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
