"""Tokenizers of Transformers, made here in a local folder. Transformers is an optional package."""

import base64
import json
import pickle
import shutil
import sys

import pytest

from megalong.checkpoint.content import kept_tokenizer, tokenizer_files
from megalong.config import DataConfig
from megalong.data.text.documents import Reading
from megalong.data.tokenizers import huggingface_tokenizer
from megalong.data.tokenizers.backend import FastTokenizer, choose_backend
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from tests.data.test_tokenizer import check_exact
from tests.launching import run

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "  Hello \u00e9\u0301 \u4f60\U0001f600\n\n\tdef f():\r\n    return 1\0 ",
    "<|end|>",
    "\u2581 \u2581x",
]


def save(folder, model, *, pre_tokenizer=None, decoder=None, normalizer=None, eos="<|end|>"):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder, backend.normalizer = pre_tokenizer, decoder, normalizer
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def byte_level(tmp_path):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {"He": 256, "\u0120\u0120": 257}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("H", "e"), ("\u0120", "\u0120")])
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return save(
        tmp_path / "byte_level",
        model,
        pre_tokenizer=byte_level,
        decoder=tokenizers.decoders.ByteLevel(),
    )


@pytest.fixture
def byte_fallback(tmp_path):
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {"\u2581": 256, "H": 257, "e": 258, "He": 259}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[("H", "e")], byte_fallback=True)
    decoders = tokenizers.decoders
    return save(
        tmp_path / "byte_fallback",
        model,
        normalizer=tokenizers.normalizers.Replace(" ", "\u2581"),
        decoder=decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    )


def test_byte_level_is_exact(byte_level):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", byte_level)
    assert tokenizer.vocab_size == 259 and tokenizer.eod == 258
    assert 256 in tokenizer.encode("Hello") and 257 in tokenizer.encode("  x")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.eod not in ids


def test_merges_are_part_of_the_fingerprint(byte_level, tmp_path):
    """In another order they join other pieces. How the library writes them down does not matter."""
    shutil.copytree(byte_level, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    pairs = [
        pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]
    ]

    def fingerprint(merges):
        content["model"]["merges"] = merges
        file.write_text(json.dumps(content))
        return build_tokenizer("HuggingFaceTokenizer", str(file.parent)).fingerprint

    known = build_tokenizer("HuggingFaceTokenizer", byte_level).fingerprint
    assert known == fingerprint(pairs) == fingerprint([" ".join(pair) for pair in pairs])
    assert known != fingerprint(pairs[::-1])


def test_a_copy_for_another_process_imports_no_torch(byte_level, tmp_path):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", byte_level)
    (tmp_path / "copy").write_bytes(pickle.dumps(tokenizer))
    probe = (
        "import pickle, sys; copy = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print([copy.encode(text) for text in eval(sys.argv[2])], copy.eod)\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    done = run([sys.executable, "-c", probe, str(tmp_path / "copy"), repr(TEXTS)])
    assert done.stdout.strip() == f"{[tokenizer.encode(text) for text in TEXTS]} {tokenizer.eod}"


def test_byte_fallback_is_exact_but_for_the_stand_in_of_the_space(byte_fallback):
    with pytest.warns(UserWarning, match="unchanged"):
        tokenizer = build_tokenizer("HuggingFaceTokenizer", byte_fallback)
    for text in TEXTS[:2]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.eod not in ids


@pytest.mark.parametrize("pattern", [None, *sorted(huggingface_tokenizer._CUT_PATTERNS)])
def test_cutting_long_texts_does_not_change_the_ids(tmp_path, monkeypatch, corpus_texts, pattern):
    pre_tokenizers = tokenizers.pre_tokenizers
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        by_pattern = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        split = pre_tokenizers.Sequence([by_pattern, split])
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = split
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus_texts[:5], trainer)
    folder = save(
        tmp_path, backend.model, pre_tokenizer=split, decoder=tokenizers.decoders.ByteLevel()
    )
    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    assert tokenizer._may_cut
    odd = "a;\nb\n\nc \nd\r\ne\n/f//\ng'S\nt 12\n34\n\tx\u00a0\ny\u2028\nz_\nA\nBc\n" * 20
    odd += "#if 1\n#x\n'll\n's\n}\n};\n*a\n**\n1\n22\n-\n/\n//\n\"\n'\n(\n~\n" * 20
    monkeypatch.setattr(huggingface_tokenizer, "_CUT_CHARACTERS", 3)
    for text in [*corpus_texts[:20], odd, "x" * 1000, "\n" * 1000, *TEXTS]:
        whole = backend.encode(text).ids
        assert tokenizer.encode(text) == whole == tokenizer.encode_array(text).tolist()


def test_the_fast_library_gives_the_same_ids(tmp_path):
    """Names of special tokens in a text are text for it too."""
    pytest.importorskip("gigatoken")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {character: i for i, character in enumerate(sorted(alphabet))}
    vocabulary |= {"He": 256, "\u0120\u0120": 257, "<|": 258}
    merges = [("H", "e"), ("\u0120", "\u0120"), ("<", "|")]
    folder = save(
        tmp_path / "gpt2",
        tokenizers.models.BPE(vocab=vocabulary, merges=merges),
        pre_tokenizer=tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=tokenizers.decoders.ByteLevel(),
    )
    usual = build_tokenizer("HuggingFaceTokenizer", folder)
    fast = FastTokenizer(usual)
    for text in [*TEXTS, "Hello<|end|>  <|end|>x"]:
        assert fast.encode(text) == usual.encode(text) and fast.decode(fast.encode(text)) == text


def test_what_cannot_be_used_is_refused(tmp_path):
    words = tokenizers.models.WordLevel(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]")
    folder = save(tmp_path / "words", words)
    with pytest.raises(ValueError, match="how its tokens spell bytes is unknown"):
        build_tokenizer("HuggingFaceTokenizer", folder)
    folder = save(tmp_path / "no_eos", words, eos=None)
    with pytest.raises(ValueError, match="no eos_token"):
        build_tokenizer("HuggingFaceTokenizer", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--tokenizer-model .*empty"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "empty"))


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


def test_the_fast_library_gives_the_same_ids_tiktoken(description, corpus_texts):
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
