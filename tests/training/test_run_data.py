"""Data that can be trained on, and is hardly what was meant."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.config.arguments import parse_arguments
from megalong.training.run_data import open_run_data
from tests.launching import small_run_flags


@pytest.mark.parametrize(
    "document, told",
    [
        ([65] * 199 + [256], []),
        ([65] * 200, ["its documents end without the end-of-document token, so"]),
        ([65, 256], ["its training part is 2 tokens, so that every sequence of --seq-length 128"]),
    ],
    ids=["in order", "without ends", "two tokens"],
)
def test_what_is_told(tmp_path, document, told):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.uint16)
    builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "data.idx"))
    flags = small_run_flags(tmp_path / "data", split="1,0,0")
    lines = open_run_data(parse_arguments(flags).resolve(1)).oddities
    assert len(lines) == len(told)
    assert all(words in line for line, words in zip(lines, told, strict=True))
