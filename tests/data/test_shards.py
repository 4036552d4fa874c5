"""A folder, or a pattern, of .bin/.idx pairs as one source."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.data import shards
from megalong.data.indexed import IndexedDocuments
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.shards import ShardedDocuments, open_documents
from megalong.data.stream import TokenStream
from megalong.utils.errors import UserError

PARTS = {"part_0": [[1, 2, 3], [], [4]], "part_1": [], "part_2": [[5]], "other": [[], [6, 7], []]}


def write(prefix: Path, documents, dtype=np.uint16, **description) -> None:
    with DocumentWriter(str(prefix), dtype) as writer:
        tokens = np.array([token for document in documents for token in document], dtype)
        writer.add(tokens, [len(document) for document in documents])
        writer.commit({"max_token_id": int(tokens.max(initial=0))} | description)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, (name, documents) in enumerate(PARTS.items()):
        write(folder / name, documents, (np.uint16, np.int32)[number % 2], vocab_size=9)
    return folder


def test_a_folder_is_its_pairs_by_name(folder):
    documents = open_documents(f"{folder}/")
    assert isinstance(documents, ShardedDocuments)
    expected = [document for name in sorted(PARTS) for document in PARTS[name]]
    assert documents.lengths.tolist() == [len(document) for document in expected]
    assert (documents.num_documents, documents.num_tokens) == (7, 7)
    assert (documents.max_token_id, documents.vocab_size) == (7, 9)
    assert documents.made_with == {}
    for i, document in enumerate(expected):
        for start in range(len(document) + 1):
            for stop in range(start, len(document) + 1):
                assert documents.read(i, start, stop).tolist() == document[start:stop]
        assert documents.read(i).tolist() == document
    assert documents.place(5) == f"document 2 of {folder}/part_0"
    assert documents.place(6) == f"document 0 of {folder}/part_2"
    for arguments in [(7,), (-1,), (1, 0, 3), (1, 2, 1)]:
        with pytest.raises(IndexError):
            documents.read(*arguments)
    stream = TokenStream(documents, range(7), 3, seed=1, vocab_size=9)
    assert sorted(stream.tokens(0, 7).tolist()) == [1, 2, 3, 4, 5, 6, 7]


def test_a_pattern_picks_some(folder):
    for end in ("", ".bin", ".idx"):
        documents = open_documents(f"{folder}/part_[02]{end}")
        assert documents.lengths.tolist() == [3, 0, 1, 1]
    # A pair goes before a folder of that name.
    write(folder.parent / "shards", [[8]])
    assert isinstance(open_documents(str(folder)), IndexedDocuments)


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 5)
    for i in range(40):
        write(tmp_path / f"part_{i:02d}", [[i, i + 1]])
    before = len(os.listdir("/proc/self/fd"))
    documents = ShardedDocuments(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before
    for i in np.random.default_rng(0).permutation(40).tolist():
        assert documents.read(i).tolist() == [i, i + 1]
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    del documents
    assert len(os.listdir("/proc/self/fd")) == before


def test_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    for document in ([[1, 2], [3], [], [4]], [], [[5], [6, 7]], [[]]):
        tokens = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(tokens), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "x.idx"))
    documents = ShardedDocuments(str(tmp_path))
    assert documents.max_token_id is None
    assert [documents.read(i).tolist() for i in range(4)] == [[1, 2, 3, 4], [], [5, 6, 7], []]


def test_what_is_wrong_names_the_pair(folder):
    def message(path=folder) -> str:
        with pytest.raises(UserError) as error:
            open_documents(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message(f"{folder}/none_*").endswith("/none_*: no .bin/.idx pair of that name")
    (folder / "empty").mkdir()
    assert message(folder / "empty").endswith("empty: no .bin/.idx pair in the folder")
    write(folder / "empty" / "x", [[]])
    assert "the 1 pairs of .bin and .idx hold no tokens" in message(folder / "empty")

    documents = open_documents(str(folder))
    (folder / "part_2.bin").rename(folder / "gone.bin")
    with pytest.raises(UserError, match=r"--data-path .*shards/part_2\.bin: No such file"):
        documents.read(6)
    assert f"no file {folder}/part_2.bin; its pair is there" in message()
    (folder / "part_2.bin").write_bytes(b"")
    assert f"{folder}/part_2.bin: 0 bytes, but" in message()
    os.truncate(folder / "part_0.bin", 2)
    with pytest.raises(UserError, match=r"part_0\.bin: has become shorter"):
        documents.read(3)

    for name in ("part_0", "part_2"):
        for suffix in (".bin", ".idx", ".json"):
            (folder / (name + suffix)).unlink()
    write(folder / "part_2", [[5]], vocab_size=8)
    found = message()
    assert "made with different tokenizers" in found
    assert f"9 in {folder}/other, 8 in {folder}/part_2" in found
    for name, hashed in (("other", "ab"), ("part_2", "cd")):
        for suffix in (".bin", ".idx", ".json"):
            (folder / (name + suffix)).unlink()
        made_with = {"tokenizer_sha256": hashed, "tokenizer_model": f"{hashed}.model"}
        write(folder / name, [[5]], vocab_size=9, **made_with)
        if name == "part_2":
            assert f"sha256 of the tokenizer: ab in {folder}/other, cd in" in message()
            for suffix in (".bin", ".idx", ".json"):
                (folder / ("part_2" + suffix)).unlink()
    assert open_documents(str(folder)).made_with["tokenizer_model"] == "ab.model"
    shutil.rmtree(folder)
    assert "no file" in message()
