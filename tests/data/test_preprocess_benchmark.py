"""tools/benchmarks/preprocess.py: what it compares, and a small run of it."""

import json
import sys

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from tests.launching import REPOSITORY, run

SCRIPT = REPOSITORY / "tools" / "benchmarks" / "preprocess.py"
sys.path.insert(0, str(SCRIPT.parent))
from preprocess_same import check_same, counts, documents_apart  # noqa: E402

TEXTS = ["def f(x):\n    return x", 'ticks = ["\u2581", "\u2582"]', "import os\n", "\u2581", "a b"]


@pytest.fixture
def made(tmp_path, tokenizer_model):
    """The tokenizer, a corpus, and a function: the prefix of documents in files, and lengths."""
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))

    def write(name: str, documents: list[list[int]]) -> tuple[str, list[int]]:
        builder = IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for document in documents:
            builder.add_document(document, [len(document)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        return str(tmp_path / name), [len(document) for document in documents]

    return tokenizer, corpus, write


def check(made, ours, theirs) -> list[str]:
    tokenizer, corpus, write = made
    apart = documents_apart(corpus, tokenizer)
    assert apart == [1, 3]
    prefixes, found = {}, {}
    for name, documents in {"ours": ours, "fast": ours, "megatron": theirs}.items():
        prefixes[name], lengths = write(name, documents)
        found[name] = tuple(counts(lengths, apart, 1).values())
    return list(check_same(found, prefixes, corpus, apart, tokenizer))


def test_the_library_may_differ_where_it_does_not_give_the_text_back(made, tokenizer_model):
    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=tokenizer_model)
    ours, theirs = [*map(made[0].encode, TEXTS)], [*map(library.encode, TEXTS)]
    assert [a == b for a, b in zip(ours, theirs, strict=True)] == [True, False, True, False, True]
    but_for = " (of library and megatron but for 2 documents with U+2581)"
    assert check(made, ours, theirs) == [
        f"as many tokens: ours, fast, megatron{but_for}",
        "identical files: ours, fast",
        "ours: the text of documents with U+2581 comes back",
        f"identical documents: ours, megatron{but_for}",
    ]
    longer = [theirs[0], theirs[1], [*theirs[2], 9], theirs[3], theirs[4]]
    with pytest.raises(UserError, match="not the same number of tokens: "):
        check(made, ours, longer)
    other = [*theirs[:4], [9] * len(theirs[4])]
    with pytest.raises(UserError, match="differ between documents 4 and 5"):
        check(made, ours, other)
    moved = [*theirs[:2], theirs[4], theirs[3], theirs[2]]
    with pytest.raises(UserError, match="differ between documents 2 and 3"):
        check(made, ours, moved)
    with pytest.raises(UserError, match="document 1 does not give its text back"):
        check(made, theirs, theirs)


def test_of_a_text_that_was_read_several_times(made):
    assert counts([3, 5, 7] * 2, [1], 2) == {"tokens": 30, "tokens_apart": 10}
    assert documents_apart(made[1], build_tokenizer("ByteTokenizer")) == []


@pytest.mark.long
def test_a_small_run(made, tmp_path, tokenizer_model):
    """Of all contenders that need no clone."""
    made[1].rename(tmp_path / "corpus_9.jsonl")
    flags = ["--work", str(tmp_path), "--max-bytes", "9", "--rounds", "1", "--workers", "2"]
    done = run([sys.executable, str(SCRIPT), *flags, "--tokenizer-model", tokenizer_model])
    assert "identical files: ours, fast\n" in done.stdout
    results = json.loads((tmp_path / "preprocess.json").read_text())
    assert results["settings"]["documents_apart"] == 2
    found = {name: rows[0]["tokens_apart"] for name, rows in results["runs"].items()}
    assert found["ours"] == found["fast"] == found["gigatoken"] > found["library"]
