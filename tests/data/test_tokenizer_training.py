"""Training a tokenizer: what it learns, that it is reproducible, what it says when it cannot."""

import gzip

import pytest

from megalong.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.data.tokenizers.tokenizer_training import sample_chunks, train_sentencepiece

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
