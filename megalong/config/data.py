"""Tokens in, and how they are divided."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.flags import flag
from megalong.data.length_upsampling import LengthUpsampling
from megalong.data.tokenizer import TOKENIZERS
from megalong.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Tokens in, and how they are divided."""

    data_path: str | None = flag(None, "prefix of the .bin/.idx pair of tools/preprocess_data.py")
    split: str = flag("969,30,1", "shares of the documents for training, validation, test")
    sample_mode: str = flag(
        "stream",
        "where the sequences of the training begin: stream, wherever the one before ended;"
        " document, at the beginning of a document where that is as long as a sequence",
        choices=("stream", "document"),
    )
    length_upsampling: tuple[str, ...] | None = flag(
        None,
        "TOKENS:WEIGHT (in YAML in quotes): how often the training sees documents of at least so"
        " many tokens in an epoch, such as 0:1 32768:5; shorter ones than the least once",
        item=str,
    )
    tokenizer_type: str = flag(
        "SentencePieceTokenizer",
        "tokenizer",
        choices=tuple(TOKENIZERS),
    )
    tokenizer_model: str | None = flag(None, "file (or folder) of the tokenizer")
    prepend_bos: bool = flag(
        False, "the documents begin with a beginning-of-text token: preprocess_data's --prepend-bos"
    )
    document_attention: str = flag(
        "mixed",
        "whether a token sees the documents before its own in the sequence (mixed), or its own"
        " document alone (isolated)",
        choices=("mixed", "isolated"),
    )
    eod_mask_loss: bool = flag(
        False,
        "do not count how the first token of a document is predicted from the end-of-document token"
        " before it, in training and in evaluation",
    )

    @property
    def isolates_documents(self) -> bool:
        """Whether documents are kept apart."""
        return self.document_attention == "isolated"

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

    def check(self, causal: bool) -> None:
        """Raise UserError where data or tokenizer is missing, or a flag is of another objective.
        causal: whether next tokens are predicted."""
        if self.eod_mask_loss and not causal:
            raise UserError(
                "--eod-mask-loss is about predicting the next token: with --objective mlm leave it"
                " out, no token is predicted from another, and the end-of-document token never"
            )
        if self.data_path is None:
            raise UserError(
                "--data-path is missing: the prefix that tools/preprocess_data.py wrote"
            )
        if self.tokenizer_model is None and self.tokenizer_type != "ByteTokenizer":
            raise UserError(
                f"--tokenizer-model is missing: {self.tokenizer_type} needs the file that"
                " tools/train_tokenizer.py wrote (ByteTokenizer needs none)"
            )
        _ = self.upsampling  # an error, where it is not understood
