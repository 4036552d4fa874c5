"""The tokenizer and the token streams of a run, opened before any process group exists, so that bad
input ends the run at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megalong.config import Config
from megalong.data.batches import (
    IGNORE_INDEX,
    NO_BORDERS,
    DocumentRules,
    evaluation_batches,
    num_evaluation_batches,
)
from megalong.data.document_samples import DocumentSamples
from megalong.data.formats import open_documents
from megalong.data.masking import ADD_A_ROW, Masking
from megalong.data.stream import TokenStream, split_documents
from megalong.data.tokenizer import Tokenizer, build_tokenizer
from megalong.errors import UserError, system_errors_of
from megalong.wording import counted


@dataclass(frozen=True)
class RunData:
    """What a run reads.

    held_out: the streams of "validation" and "test", where `--split` gives them documents.
    oddities: what can be trained on, and yet is hardly what was meant; a line each.
    token_bytes: UTF-8 bytes that each token id stands for, int32 (vocab size,).
    masking: how tokens are masked; None: the next ones are predicted.
    documents: what their borders mean.
    """

    tokenizer: Tokenizer
    token_bytes: np.ndarray
    train: TokenStream | DocumentSamples
    held_out: dict[str, TokenStream]
    oddities: list[str]
    masking: Masking | None = None
    documents: DocumentRules = NO_BORDERS

    def describe(self, config: Config) -> Iterator[str]:
        """What the training data is like, in lines; it looks at the lengths of all documents."""
        mode, upsampling = config.data.sample_mode, config.data.upsampling
        if upsampling is not None:
            yield upsampling.describe(self.train.lengths)
        yield f"--sample-mode {mode}: {self.train.context_report().in_words()}"


def open_run_data(config: Config) -> RunData:
    """Open everything that `config.data` names.

    Raises UserError naming the flag or the file where that fails.
    """
    data = config.data
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    ids_of_data, masking = tokenizer.vocab_size, None
    if not config.training.causal:
        tokenizer = tokenizer.with_mask()
        masking = Masking.of(tokenizer, config.training.mask_rate)
        if ids_of_data == config.model.padded_vocab_size < tokenizer.vocab_size:
            raise UserError(f"--padded-vocab-size {ids_of_data}: {ADD_A_ROW}")
    config.model.vocabulary_rows(tokenizer.vocab_size)  # an error, where they are too few
    with system_errors_of("--data-path", data.data_path):
        documents = open_documents(data.data_path)
    made_with = documents.vocab_size
    if made_with is not None and made_with != ids_of_data:
        raise UserError(
            f"--data-path {data.data_path} was made with a tokenizer of {made_with} ids, and"
            f" {data.tokenizer_flag} has {ids_of_data}: give the same"
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
    if config.run.keep_best and not ranges[1]:
        raise UserError(
            f"--keep-best goes by the validation loss, and --split {data.split} leaves no document"
            " for validation: leave it out, or change --split"
        )

    def stream(document_range: range, shuffle: bool, upsampling=None) -> TokenStream:
        return TokenStream(
            documents,
            document_range,
            config.model.seq_length,
            config.training.seed,
            shuffle=shuffle,
            upsampling=upsampling,
            vocab_size=ids_of_data,
        )

    train = stream(ranges[0], shuffle=True, upsampling=data.upsampling)
    if data.sample_mode == "document":
        train = DocumentSamples(train)
    parts = zip(("validation", "test"), ranges[1:], strict=True)
    held_out = {name: stream(part, shuffle=False) for name, part in parts if part}
    for name, part in held_out.items():  # too small to evaluate on: found now, not at the end
        if masking is None:
            num_evaluation_batches(part, micro_batch_size=1, data_parallel_size=1)
        else:
            _check_masks(name, part, masking, config)
    return RunData(
        tokenizer=tokenizer,
        token_bytes=tokenizer.token_bytes(),
        train=train,
        held_out=held_out,
        oddities=_oddities(train, config, tokenizer),
        masking=masking,
        documents=DocumentRules(
            isolated=data.isolates_documents,
            unpredicted_from=tokenizer.eod if data.eod_mask_loss else None,
        ),
    )


def _check_masks(name: str, part: TokenStream, masking: Masking, config: Config) -> None:
    """Raise UserError where an evaluation would have no masked token."""
    size = config.run.eval_iters * config.training.global_batch_size
    rank = {"micro_batch_size": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
    batches = evaluation_batches(part, num_samples=size or None, masking=masking, **rank)
    if not any((batch["labels"] != IGNORE_INDEX).any() for batch in batches):
        raise UserError(
            f"--mask-rate {config.training.mask_rate:g}: of the {part.tokens_per_epoch:,} tokens of"
            f" --split {config.data.split} for {name} none would be masked in an evaluation: give"
            " it a larger share, or raise --mask-rate or --eval-iters"
        )


def _oddities(
    train: TokenStream | DocumentSamples, config: Config, tokenizer: Tokenizer
) -> list[str]:
    lines = []
    if train.tokens_per_epoch <= config.model.seq_length:
        lines.append(
            f"--data-path {config.data.data_path}: its training part is"
            f" {counted(train.tokens_per_epoch, 'token')}, so that every sequence of --seq-length"
            f" {config.model.seq_length} repeats them"
        )
    if not config.training.causal:
        return lines  # special tokens are never told
    documents, lengths = train.documents, train.documents.lengths
    looked_at = [i for i in train.document_range[:100] if lengths[i]][:10]
    ends = {int(documents.read(i, int(lengths[i]) - 1)[0]) for i in looked_at}
    if tokenizer.eod not in ends:
        lines.append(
            f"--data-path {config.data.data_path}: its documents end without the end-of-document"
            " token, so that the model learns no end of a text: preprocess_data.py --append-eod"
        )
    return lines
