"""Tokenizers of Transformers, made here in a local folder. Transformers is an optional package."""

import json
import pickle
import shutil
import sys

import pytest

from megalong.data.tokenizers import huggingface_tokenizer
from megalong.data.tokenizers.backend import FastTokenizer
from megalong.data.tokenizers.tokenizer import build_tokenizer
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
