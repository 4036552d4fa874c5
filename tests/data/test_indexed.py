"""Reading pairs of ours and of Megatron, and the errors for damaged ones."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.data.indexed import IndexedDocuments
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


def test_what_was_read_outlives_the_documents(write_documents, recwarn):
    documents = IndexedDocuments(write_documents(DOCUMENTS))
    part = documents.read(3)
    del documents
    gc.collect()
    assert part.tolist() == DOCUMENTS[3]
    assert not [
        w for w in recwarn if issubclass(w.category, pytest.PytestUnraisableExceptionWarning)
    ]


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
