"""Whether data is of the tokenizer that it is to be used with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from megalong.utils.errors import UserError

if TYPE_CHECKING:
    from megalong.data.stream import Documents
    from megalong.data.tokenizers.tokenizer import Tokenizer


def check_tokenizer(
    documents: Documents, tokenizer: Tokenizer, tokenizer_flag: str, place: str | None = None
) -> None:
    """Raise UserError where the documents were made with another tokenizer.

    tokenizer: as it is for texts, without the mask token of a masked-language model.
    tokenizer_flag: what names it, with its value. place: what names the documents; None:
    --data-path. Data that does not say what made it passes,
    where the numbers of ids agree.
    """
    ids, made_with = documents.vocab_size, documents.made_with
    place = place or f"--data-path {documents.prefix}"
    if ids is not None and ids != tokenizer.vocab_size:
        raise UserError(
            f"{place} was made with a tokenizer of {ids} ids, and"
            f" {tokenizer_flag} has {tokenizer.vocab_size}: give the same"
        )
    there = made_with.get("tokenizer_sha256")
    if there is not None and there != tokenizer.fingerprint:
        file, sidecar = made_with.get("tokenizer_model"), f"{documents.prefix}.json"
        where = f" ({sidecar})" if os.path.isfile(sidecar) else ""  # not of a folder of pairs
        raise UserError(
            f"{place} was made with another tokenizer than {tokenizer_flag}:"
            f" with {f'{file}, ' if file else 'that '}of sha256 {there[:12]} and not"
            f" {tokenizer.fingerprint[:12]}{where}: give the same"
        )
