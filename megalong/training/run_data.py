"""The tokenizer and the token streams of a run, opened before any process group exists, so that bad
input ends the run at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalong.config import Config
from megalong.data.batches import num_evaluation_batches
from megalong.data.formats import open_documents
from megalong.data.stream import TokenStream, split_documents
from megalong.data.tokenizer import Tokenizer, build_tokenizer
from megalong.errors import UserError, system_errors_of


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    held_out: the streams of "validation" and "test", where `--split` gives them documents.
    token_bytes: UTF-8 bytes that each token id stands for, int32 (vocab size,).
    """

    tokenizer: Tokenizer
    token_bytes: np.ndarray
    train: TokenStream
    held_out: dict[str, TokenStream]


def open_run_data(config: Config) -> RunData:
    """Open everything that `config.data` names.

    Raises UserError naming the flag or the file where that fails.
    """
    data = config.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    config.model.vocabulary_rows(tokenizer.vocab_size)  # an error, where they are too few
    with system_errors_of("--data-path", data.data_path):
        documents = open_documents(data.data_path)
    made_with = documents.vocab_size
    if made_with is not None and made_with != tokenizer.vocab_size:
        raise UserError(
            f"--data-path {data.data_path} was made with a tokenizer of {made_with} ids, and"
            f" {data.tokenizer_flag} has {tokenizer.vocab_size}: give the same"
        )
    if documents.prepend_bos not in (None, data.prepend_bos):
        made, flag = ("with", "") if documents.prepend_bos else ("without", "no-")
        raise UserError(
            f"--data-path {data.data_path} was made {made} --prepend-bos: set"
            f" --{flag}prepend-bos, or preprocess the text again"
        )
    ranges = split_documents(documents.num_documents, data.split)
    if not ranges[0]:
        raise UserError(f"--split {data.split} leaves no document for training")

    def stream(document_range: range, shuffle: bool) -> TokenStream:
        return TokenStream(
            documents,
            document_range,
            config.model.seq_length,
            config.training.seed,
            shuffle=shuffle,
            vocab_size=tokenizer.vocab_size,
        )

    parts = zip(("validation", "test"), ranges[1:], strict=True)
    held_out = {name: stream(part, shuffle=False) for name, part in parts if part}
    for part in held_out.values():  # a split too small to evaluate on is found now, not at the end
        num_evaluation_batches(part, micro_batch_size=1, data_parallel_size=1)
    return RunData(
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(),
        train=stream(ranges[0], shuffle=True),
        held_out=held_out,
    )
