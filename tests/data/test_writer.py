"""The writer's files are Megatron's, byte for byte."""

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megalong.data.preprocessing.writer import DocumentWriter, token_dtype


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
