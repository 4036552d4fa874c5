"""Tokens in, and how they are divided."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.flags import flag
from megalong.data.tokenizer import TOKENIZERS
from megalong.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Tokens in, and how they are divided."""

    data_path: str | None = flag(None, "prefix of the .bin/.idx pair of tools/preprocess_data.py")
    split: str = flag("969,30,1", "shares of the documents for training, validation, test")
    tokenizer_type: str = flag(
        "SentencePieceTokenizer",
        "tokenizer",
        choices=tuple(TOKENIZERS),
    )
    tokenizer_model: str | None = flag(None, "file (or folder) of the tokenizer")
    prepend_bos: bool = flag(
        False, "the documents begin with a beginning-of-text token: preprocess_data's --prepend-bos"
    )

    @property
    def tokenizer_flag(self) -> str:
        """The flag that says which tokenizer it is, with its value."""
        if self.tokenizer_model is None or self.tokenizer_type == "ByteTokenizer":
            return f"--tokenizer-type {self.tokenizer_type}"
        return f"--tokenizer-model {self.tokenizer_model}"

    def check(self) -> None:
        """Raise UserError where data or tokenizer is missing."""
        if self.data_path is None:
            raise UserError(
                "--data-path is missing: the prefix that tools/preprocess_data.py wrote"
            )
        if self.tokenizer_model is None and self.tokenizer_type != "ByteTokenizer":
            raise UserError(
                f"--tokenizer-model is missing: {self.tokenizer_type} needs the file that"
                " tools/train_tokenizer.py wrote (ByteTokenizer needs none)"
            )
