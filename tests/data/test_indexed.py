"""Reading pairs of ours and of Megatron, and the errors for damaged ones."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megalong.data import indexed
from megalong.data.indexed import IndexedDocuments, token_dtype
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.stream import TokenStream
from megalong.utils.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]


def test_reads_every_slice_of_every_document(write_documents):
    documents = IndexedDocuments(write_documents(DOCUMENTS))
    assert documents.lengths.dtype == np.int64
    assert documents.lengths.tolist() == [3, 0, 1, 4]
    assert (documents.num_documents, documents.num_tokens) == (4, 8)
    assert documents.max_token_id == 12
    for i, document in enumerate(DOCUMENTS):
        assert documents.read(i).tolist() == document
        for start in range(len(document) + 1):
            for stop in range(start, len(document) + 1):
                assert documents.read(i, start, stop).tolist() == document[start:stop]


def test_reads_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    documents = [[[1, 2], [3], [], [4, 5, 6]], [[7, 8, 9, 10]], [], [[11], [12, 13]]]
    for document in documents:
        tokens = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(tokens), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "x.idx"))

    read = IndexedDocuments(str(tmp_path / "x"))
    assert read.max_token_id is None
    assert read.lengths.tolist() == [6, 4, 0, 3]
    for i, document in enumerate(documents):
        tokens = [token for sequence in document for token in sequence]
        for start in range(len(tokens) + 1):
            for stop in range(start, len(tokens) + 1):
                part = read.read(i, start, stop)
                assert part.tolist() == tokens[start:stop] and part.dtype == np.int32


def test_ranges_outside_a_document_are_refused(write_documents):
    documents = IndexedDocuments(write_documents(DOCUMENTS))
    for arguments in [(4,), (-1,), (0, 0, 4), (0, 2, 1), (0, -1, 2)]:
        with pytest.raises(IndexError):
            documents.read(*arguments)


def test_missing_files(tmp_path, write_documents):
    prefix = write_documents(DOCUMENTS)

    def message(name) -> str:
        with pytest.raises(UserError) as error:
            IndexedDocuments(str(name))
        assert f"--data-path {name}" in str(error.value)
        return str(error.value)

    assert "give the prefix without .bin: " + prefix in message(prefix + ".bin")
    assert "give the prefix without .idx: " + prefix in message(prefix + ".idx")
    assert "PREFIX_KEY_document" in message(tmp_path / "other")
    assert f"no folder {tmp_path}/none" in message(tmp_path / "none" / "x")
    Path(prefix + ".idx").unlink()
    assert "documents.idx; its pair is there" in message(prefix)


@pytest.mark.parametrize("size", [0, 5])
def test_index_without_magic(write_documents, size):
    prefix = write_documents(DOCUMENTS)
    Path(prefix + ".idx").write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=r"documents\.idx: not an index file"):
        IndexedDocuments(prefix)


def test_index_cut_short_anywhere(write_documents):
    prefix = write_documents(DOCUMENTS)
    whole = Path(prefix + ".idx").read_bytes()
    for size in range(9, len(whole)):
        Path(prefix + ".idx").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"documents\.idx: cut short"):
            IndexedDocuments(prefix)


@pytest.mark.parametrize(
    "offset, value, message",
    [
        (9, b"\x02", "format version 2"),
        (17, b"\x63", "data type code 99"),
        (17, b"\x07", "data type code 7"),
        (34, b"\xff\xff\xff\xff", "a sequence of -1 tokens"),
        (34 + 4 * 4 + 8, b"\x03", "sequence 1 is to begin at byte 3 of the .bin, .* ends at 6"),
        (34 + 4 * 4 + 16 + 7, b"\x80", "sequence 2 is to begin at byte -9,223"),
        (34 + 4, b"\x02", "sequence 2 is to begin at byte 6 of the .bin, .* ends at 10"),
        (34 + 12 * 4, b"\x01", "document boundaries"),
        (34 + 12 * 4 + 4 * 8, b"\x03", "document boundaries"),
        (34 + 12 * 4 + 1 * 8, b"\x03", "document boundaries"),
    ],
)
def test_damaged_index(write_documents, offset, value, message):
    prefix = write_documents(DOCUMENTS)
    content = bytearray(Path(prefix + ".idx").read_bytes())
    content[offset : offset + len(value)] = value
    Path(prefix + ".idx").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        IndexedDocuments(prefix)
    assert prefix + ".idx" in str(error.value)


def test_bin_of_another_size_than_the_index_says(write_documents):
    prefix = write_documents(DOCUMENTS)
    whole = Path(prefix + ".bin").read_bytes()
    for content, what in [(whole[:-1], "15 .* cut short"), (whole + b"x", "17 .* too long")]:
        Path(prefix + ".bin").write_bytes(content)
        size, problem = what.split(" .* ")
        with pytest.raises(
            ValueError, match=rf"documents\.bin: {size} bytes, but .* describes 16: {problem}"
        ):
            IndexedDocuments(prefix)


def test_no_tokens(write_documents):
    for documents in ([], [[], []]):
        prefix = write_documents(documents, name=f"empty{len(documents)}")
        with pytest.raises(ValueError, match=r"--data-path .* holds no tokens"):
            IndexedDocuments(prefix)


def test_sidecar_of_another_run(write_documents):
    prefix, other = write_documents(DOCUMENTS), write_documents([[1]], name="other")
    shutil.copy(other + ".json", prefix + ".json")
    with pytest.raises(ValueError, match=r"documents\.json: describes 1 documents"):
        IndexedDocuments(prefix)
    for text in ("[]", '{"documents": "1", "tokens": 1}', '{"documents": 1, "tokens": null}',
                 '{"documents": 1, "tokens": 1, "max_token_id": "5"}'):  # fmt: skip
        Path(prefix + ".json").write_text(text)
        with pytest.raises(ValueError, match=r"documents\.json: not a description"):
            IndexedDocuments(prefix)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatrons_builder(tmp_path, dtype):
    random = np.random.default_rng(3)
    documents = [random.integers(0, 5000, size) for size in (5, 1, 0, 1000, 37)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))

    with DocumentWriter(str(tmp_path / "ours"), dtype) as writer:
        for part in (documents[:2], documents[2:]):
            writer.add(np.concatenate(part).astype(dtype), [len(document) for document in part])
        writer.commit({})
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / (name + suffix) for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_same_rule_for_the_data_type():
    for vocab_size in (1, 257, 32_000, 65_499, 65_500, 65_536, 70_000, 250_000):
        assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


def test_without_commit_nothing_remains(tmp_path):
    with pytest.raises(RuntimeError), DocumentWriter(str(tmp_path / "x"), np.uint16) as writer:
        writer.add(np.ones(3, np.uint16), [3])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_document_beyond_the_format_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="2,147,483,648 tokens"),
        DocumentWriter(str(tmp_path / "x"), np.uint16) as writer,
    ):
        writer.add(np.ones(3, np.uint16), [2**31])


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
    documents = IndexedDocuments(f"{folder}/")
    assert isinstance(documents, IndexedDocuments)
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
        documents = IndexedDocuments(f"{folder}/part_[02]{end}")
        assert documents.lengths.tolist() == [3, 0, 1, 1]
    # A pair goes before a folder of that name.
    write(folder.parent / "shards", [[8]])
    assert isinstance(IndexedDocuments(str(folder)), IndexedDocuments)


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "OPEN_FILES", 5)
    for i in range(40):
        write(tmp_path / f"part_{i:02d}", [[i, i + 1]])
    before = len(os.listdir("/proc/self/fd"))
    documents = IndexedDocuments(str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before
    for i in np.random.default_rng(0).permutation(40).tolist():
        assert documents.read(i).tolist() == [i, i + 1]
        assert len(os.listdir("/proc/self/fd")) <= before + 5
    del documents
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_wrong_names_the_pair(folder):
    def message(path=folder) -> str:
        with pytest.raises(UserError) as error:
            IndexedDocuments(str(path))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message(f"{folder}/none_*").endswith("/none_*: no .bin/.idx pair of that name")
    (folder / "empty").mkdir()
    assert message(folder / "empty").endswith("empty: no .bin/.idx pair in the folder")
    write(folder / "empty" / "x", [[]])
    assert "the 1 pairs of .bin and .idx hold no tokens" in message(folder / "empty")

    documents = IndexedDocuments(str(folder))
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
    assert IndexedDocuments(str(folder)).made_with["tokenizer_model"] == "ab.model"
    shutil.rmtree(folder)
    assert "no file" in message()
