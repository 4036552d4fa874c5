"""Data that can be trained on, and is hardly what was meant."""

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.config.arguments import parse_arguments
from megalong.errors import UserError
from megalong.hf.tokenizer_files import export_tokenizer
from megalong.training.run_data import describe_training, open_run_data
from tests.launching import small_run_flags


def write(prefix, *documents):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")


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
    write(tmp_path / "data", document)
    flags = small_run_flags(tmp_path / "data", split="1,0,0")
    lines = open_run_data(parse_arguments(flags).resolve(1)).oddities
    assert len(lines) == len(told)
    assert all(words in line for line, words in zip(lines, told, strict=True))


def test_samples_that_begin_with_documents_and_weights_by_length(tmp_path):
    """The run says what they make of the data."""
    write(tmp_path / "data", [65] * 199 + [256], [65] * 49 + [256])
    own = {"split": "1,0,0", "sample_mode": "document", "length_upsampling": "128:2.5"}
    config = parse_arguments(small_run_flags(tmp_path / "data", **own)).resolve(1)
    data = open_run_data(config)
    assert data.train.tokens_per_epoch == 550
    assert sorted(data.train.document_bounds(i)[1][0] for i in range(4))[-2:] == [128, 128]
    assert list(describe_training(data.train, config)) == [
        "--length-upsampling, shares of the tokens in documents of less than 128 x 1: 20.0% ->"
        " 9.1%, 128 tokens and more x 2.5: 80.0% -> 90.9%",
        "--sample-mode document: share of the tokens that have so many of their own document"
        " before them in the sequence: 64 30.7% (uncut 60.4%); 49 on average",
    ]
    with pytest.raises(UserError, match="--length-upsampling 5: TOKENS:WEIGHT is expected"):
        parse_arguments([*small_run_flags("x", length_upsampling=5)]).resolve(1)


def test_masks_need_a_mask_token(tmp_path):
    """The byte tokenizer gets one, its data is the same; a folder of Transformers must have it."""
    write(tmp_path / "data", [65] * 300 + [256])
    masked = {"split": "1,0,0", "objective": "mlm"}
    flags = small_run_flags(tmp_path / "data", **masked)
    data = open_run_data(parse_arguments(flags).resolve(1))
    assert data.masking.mask == 257 and data.tokenizer.vocab_size == 258 == len(data.token_bytes)
    assert data.train.parts[0].vocab_size == 257
    full = small_run_flags(tmp_path / "data", **masked, padded_vocab_size=257)
    with pytest.raises(UserError, match=r"--padded-vocab-size 257: the mask token needs one row"):
        open_run_data(parse_arguments(full).resolve(1))
    for with_mask in (False, True):
        folder = tmp_path / f"tokenizer{with_mask}"
        folder.mkdir()
        export_tokenizer("ByteTokenizer", None, folder, 128, with_mask=with_mask)
        own = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}
        config = parse_arguments(small_run_flags(tmp_path / "data", **masked, **own)).resolve(1)
        if with_mask:
            assert open_run_data(config).masking.mask == 257
        else:
            with pytest.raises(UserError, match=r"--objective mlm: .*False has no mask_token"):
                open_run_data(config)


def test_an_evaluation_without_a_masked_token_is_refused(tmp_path):
    write(tmp_path / "data", [65] * 300, [65] * 5)
    flags = small_run_flags(tmp_path / "data", split="1,1,0", objective="mlm", mask_rate=0.01)
    with pytest.raises(UserError, match=r"--mask-rate 0.01: of the 5 tokens .* for validation"):
        open_run_data(parse_arguments(flags).resolve(1))
