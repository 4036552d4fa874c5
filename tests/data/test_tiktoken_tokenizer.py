"""Encodings of tiktoken, made here of a byte-level vocabulary: files, exactness, export."""

import base64
import json

import pytest

from megalong.checkpoint.content import kept_tokenizer, tokenizer_files
from megalong.config import DataConfig
from megalong.data.text.documents import Reading
from megalong.data.tokenizers.backend import FastTokenizer, choose_backend
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from tests.data.test_tokenizer import TEXTS, check_exact

pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def ranks(corpus_texts) -> list[bytes]:
    """Tokens by rank: the bytes, and what a trainer merges of real text."""
    tokenizers = pytest.importorskip("tokenizers")
    from megalong.data.tokenizers.huggingface_tokenizer import byte_level_alphabet

    alphabet = byte_level_alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(corpus_texts[:20], trainer)
    learnt = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    pieces = [bytes(alphabet[character] for character in piece) for piece, _ in learnt]
    return [bytes([i]) for i in range(256)] + [piece for piece in pieces if len(piece) > 1]


@pytest.fixture
def description(ranks, tmp_path):
    """An encoding with two special tokens, one of them far behind the ranks."""
    lines = (f"{base64.b64encode(piece).decode()} {i}\n" for i, piece in enumerate(ranks))
    (tmp_path / "my.tiktoken").write_text("".join(lines))
    special = {"<|endoftext|>": len(ranks), "<|begin|>": len(ranks) + 7}
    content = {"ranks": "my.tiktoken", "pattern": "cl100k_base", "special_tokens": special}
    (tmp_path / "my.json").write_text(json.dumps(content | {"bos": "<|begin|>"}))
    return tmp_path / "my.json"


def test_every_text_comes_back(description, ranks, corpus_texts):
    tokenizer = build_tokenizer("TikTokenizer", str(description))
    assert tokenizer.vocab_size == len(ranks) + 8 and tokenizer.bos == len(ranks) + 7
    assert tokenizer.eod == len(ranks) and tokenizer.token_bytes()[tokenizer.eod] == 0
    for text in [*TEXTS, "<|endoftext|><|begin|>", *corpus_texts[:5]]:
        check_exact(tokenizer, text)
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud83d")


def test_megatrons_file_has_megatrons_ids(ranks, tmp_path):
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(piece).decode(), "token_str": ""}
        for i, piece in enumerate(ranks)
    ]
    (tmp_path / "vocab.json").write_text(json.dumps(rows))
    tokenizer = build_tokenizer("TikTokenizer", str(tmp_path / "vocab.json"))
    assert (tokenizer.eod, tokenizer.bos, tokenizer.mask) == (2, 1, 3)
    assert tokenizer.encode("\0") == [1000]
    check_exact(tokenizer, "It's 12345 \u00e9")


def test_a_checkpoint_keeps_the_encoding(description, tmp_path):
    data = DataConfig(tokenizer_type="TikTokenizer", tokenizer_model=str(description))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name, content in tokenizer_files(data).items():
        (checkpoint / name).write_bytes(content)
    text = "def f(x): return 1"
    before = build_tokenizer("TikTokenizer", str(description)).encode(text)
    description.unlink()
    kept = build_tokenizer("TikTokenizer", kept_tokenizer(checkpoint, data))
    assert kept.encode(text) == before and kept.vocab_size == 8 + kept.eod


def test_export_gives_the_same_ids(description, corpus_texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    from megalong.hf.tokenizer_files import export_tokenizer, plain_ids

    folder = tmp_path / "hf"
    folder.mkdir()
    ours = export_tokenizer("TikTokenizer", str(description), folder, 128)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == ours.eod and theirs.bos_token_id == ours.bos
    for text in [*TEXTS, *corpus_texts[:20]]:
        assert plain_ids(theirs, text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_an_export_has_the_same_ids_that_stand_for_text(description, ranks, tmp_path):
    """Though there are gaps between the special tokens, one of which no setting names."""
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from megalong.hf.loaded_model import load_model
    from megalong.hf.tokenizer_files import export_tokenizer
    from tests.hf.test_transformers import make_model

    content = json.loads(description.read_text())
    content["special_tokens"]["<|unnamed|>"] = len(ranks) + 4
    description.write_text(json.dumps(content))
    folder = tmp_path / "hf"
    folder.mkdir()
    ours = export_tokenizer("TikTokenizer", str(description), folder, 128)
    make_model(vocab_size=ours.vocab_size).save_pretrained(folder)
    loaded = load_model(folder, "cpu", torch.float32)
    assert loaded.ids == ours.text_ids == [*range(len(ranks))]
    assert build_tokenizer("HuggingFaceTokenizer", str(folder)).text_ids == ours.text_ids


def test_the_fast_library_gives_the_same_ids(description, corpus_texts):
    pytest.importorskip("gigatoken")
    usual = build_tokenizer("TikTokenizer", str(description))
    fast = FastTokenizer(usual)
    for text in [*TEXTS, "x<|endoftext|> <|begin|>", *corpus_texts[:20]]:
        assert fast.encode(text) == usual.encode(text)
    content = json.loads(description.read_text()) | {"pattern": r"\w+|\W"}
    description.write_text(json.dumps(content))
    with pytest.raises(UserError, match="gigatoken does not know the pattern"):
        FastTokenizer(build_tokenizer("TikTokenizer", str(description)))


def test_a_piece_that_no_two_others_make_is_not_for_the_fast_library(description, ranks):
    """It panics, which is no Exception; the usual library goes on."""
    pytest.importorskip("gigatoken")
    with (description.parent / "my.tiktoken").open("a") as lines:
        lines.write(f"{base64.b64encode(bytes([1, 2, 3])).decode()} {len(ranks) + 8}\n")
    usual, said = build_tokenizer("TikTokenizer", str(description)), []
    check_exact(usual, "a\1\2\3")
    assert choose_backend(usual, "auto", [], Reading(), said.append) is usual
    assert said[0].startswith("tokenizer backend: the usual library; gigatoken does not do this")
    assert "\n" not in said[0]
    with pytest.raises(UserError, match="--tokenizer-backend fast: gigatoken does not do this"):
        choose_backend(usual, "fast", [], Reading(), said.append)


def test_what_is_no_encoding_is_refused(description, tmp_path):
    def refusal(name: str) -> str:
        with pytest.raises(UserError) as refused:
            build_tokenizer("TikTokenizer", str(tmp_path / name))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert '{"ranks": "my.tiktoken", "pattern": ' in refusal("my.tiktoken")
    content = json.loads(description.read_text())
    for change, reason in [
        ({"eod": "<|end|>"}, "eod '<|end|>' is not among the special_tokens"),
        ({"special_tokens": {"<|endoftext|>": 3}}, "two tokens have one id"),
        ({"ranks": "none.tiktoken"}, "none.tiktoken: No such file"),
        ({"patern": "x"}, "'patern' is unknown"),
        ({"pattern": "("}, "takes it for no encoding"),
    ]:
        (tmp_path / "other.json").write_text(json.dumps(content | change))
        assert reason in refusal("other.json")
    (tmp_path / "bytes.tiktoken").write_text("YQ== 0\n")
    (tmp_path / "other.json").write_text(json.dumps(content | {"ranks": "bytes.tiktoken"}))
    assert "256 single bytes" in refusal("other.json")
    (tmp_path / "my.tiktoken").write_text("no ranks at all\n")
    assert "neither base64 tokens and their ranks" in refusal("my.json")
