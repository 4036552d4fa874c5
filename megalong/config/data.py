"""Tokens in, and how they are divided."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megalong.config.flags import default, flag, flag_name, refuse_without
from megalong.data.loss_mask import may_mask_loss
from megalong.data.sources import LengthUpsampling, SourceSpec, sources_of_file, sources_of_flag
from megalong.data.tokenizers.tokenizer import TOKENIZERS
from megalong.utils.errors import UserError

SPLIT = "969,30,1"
_SEPARATE = ("train_data_path", "valid_data_path", "test_data_path")


@dataclass(frozen=True)
class DataConfig:
    """Tokens in, and how they are divided."""

    data_path: tuple[str, ...] | None = flag(
        None,
        "what to train and to evaluate on, divided by --split: the prefix of the .bin/.idx pair of"
        " tools/preprocess_data.py, a folder of pairs, or a pattern; of several, each as much as"
        " it has tokens, or WEIGHT PATH WEIGHT PATH ...; NAME=PATH names a source",
    )
    data_blend: str | None = flag(
        None, "YAML file instead of these paths: a list of path, name, and weight, tokens or epochs"
    )
    train_data_path: tuple[str, ...] | None = flag(
        None, "as --data-path, all of it to train on: instead of --data-path and --split"
    )
    valid_data_path: tuple[str, ...] | None = flag(
        None,
        "what to validate on, beside --train-data-path or --data-blend: PATH, or NAME=PATH ...",
    )
    test_data_path: tuple[str, ...] | None = flag(
        None, "what to test on at the end, as --valid-data-path"
    )
    split: str | None = flag(
        None, "shares of each source's documents to train, validate, test on (default: 969,30,1)"
    )
    data_cache_path: str | None = flag(
        None, "folder, of a node or of all, to keep the order of documents in (default: in memory)"
    )
    sample_mode: str = flag(
        "stream",
        "a sequence begins where the one before ended, or with a document that is long enough",
        choices=("stream", "document"),
    )
    length_upsampling: tuple[str, ...] | None = flag(
        None,
        "TOKENS:WEIGHT (in YAML in quotes), such as 0:1 32768:5: how often an epoch has documents"
        " of at least so many tokens; shorter ones than the least once",
    )
    tokenizer_type: str = flag("SentencePieceTokenizer", "tokenizer", choices=tuple(TOKENIZERS))
    tokenizer_model: str | None = flag(None, "file (or folder) of the tokenizer")
    prepend_bos: bool = flag(
        False, "the documents begin with a beginning-of-text token: preprocess_data's --prepend-bos"
    )
    document_attention: str = flag(
        "mixed",
        "a token sees the documents before its own in the sequence, too, or its own alone",
        choices=("mixed", "isolated"),
    )
    eod_mask_loss: bool = flag(
        False,
        "leave the first token of a document, after an end-of-document token, out of the loss",
    )

    @property
    def isolates_documents(self) -> bool:
        """Whether documents are kept apart."""
        return self.document_attention == "isolated"

    @property
    def first_token_is_apart(self) -> bool:
        """Whether what stands before a text, so that it begins as a document does, belongs to the
        document before it: an end of that, which the text does not see."""
        return self.isolates_documents and not self.prepend_bos

    @property
    def masks_loss(self) -> bool:
        """Whether some tokens of the training data may not count in the loss, as far as the names
        of its files tell."""
        return any(may_mask_loss(source.path) for source in self.training_sources())

    @property
    def upsampling(self) -> LengthUpsampling | None:
        """`--length-upsampling`, read. Raises UserError where it is not understood."""
        if self.length_upsampling is None:
            return None
        return LengthUpsampling.parse(self.length_upsampling)

    @property
    def tokenizer_flag(self) -> str:
        """The flag that says which tokenizer it is, with its value."""
        if self.tokenizer_model is None or self.tokenizer_type == "ByteTokenizer":
            return f"--tokenizer-type {self.tokenizer_type}"
        return f"--tokenizer-model {self.tokenizer_model}"

    @property
    def divided(self) -> bool:
        """Whether `--split` divides the sources into training, validation and test."""
        return not (self.train_data_path or self.valid_data_path or self.test_data_path)

    def resolve(self) -> DataConfig:
        """These settings; where `--split` divides the sources and is not given, Megatron's."""
        return dataclasses.replace(self, split=default(self.split, SPLIT if self.divided else None))

    def training_sources(self) -> list[SourceSpec]:
        """What is trained on. Raises UserError where it cannot be understood."""
        if self.data_blend is not None:
            return sources_of_file(self.data_blend)
        for name in ("data_path", "train_data_path"):
            if getattr(self, name):
                return sources_of_flag(getattr(self, name), flag_name(name))
        raise UserError("--data-path is missing: set it, or --data-blend, or --train-data-path")

    def held_out_sources(self) -> dict[str, list[SourceSpec]]:
        """What is evaluated on where `--split` divides nothing: "validation" and "test". Raises
        UserError as `training_sources` does."""
        names = {"validation": "valid_data_path", "test": "test_data_path"}
        return {
            part: sources_of_flag(getattr(self, name), flag_name(name), weighted=False)
            for part, name in names.items()
            if getattr(self, name)
        }

    def check(self, causal: bool, seq_length: int) -> None:
        """Raise UserError where data or tokenizer is missing, what is given contradicts itself, or
        a flag is of another objective. causal: whether next tokens are predicted."""
        if self.isolates_documents and seq_length >= 2**31:
            raise UserError(
                f"--document-attention isolated has room for {2**31 - 1} tokens, less than"
                f" --seq-length {seq_length}: set --document-attention mixed, or fewer"
            )
        if not causal:
            what = "predicting the next token"
            refuse_without(what, "--objective causal", self, "eod_mask_loss")
        given = [
            flag_name(name)
            for name in ("data_path", "train_data_path", "data_blend")
            if getattr(self, name)
        ]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both say what to train on: keep one of them")
        if not self.divided:
            separate = next(name for name in _SEPARATE if getattr(self, name))
            if self.split is not None:
                raise UserError(
                    f"--split {self.split} divides the sources, and {flag_name(separate)} names"
                    " what is divided already: leave one of them out"
                )
            if self.data_path:
                raise UserError(
                    f"--data-path is divided by --split, which {flag_name(separate)} stands in for:"
                    " set --train-data-path instead of --data-path"
                )
        self.training_sources()
        self.held_out_sources()
        if self.tokenizer_model is None and self.tokenizer_type != "ByteTokenizer":
            raise UserError(
                f"--tokenizer-model is missing: set it to the file of {self.tokenizer_type}"
            )
        _ = self.upsampling  # an error, where it is not understood
