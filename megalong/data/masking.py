"""Masked-language modelling (BERT, arXiv 1810.04805): which tokens a model has to tell, and what
stands in their place.

Every token of text is chosen with the same probability. Of ten that are chosen eight are replaced
by the mask token, one by any token of text, and one stays, so that the model has to know the token
at every place. Special tokens, the end of document say, are never chosen.

What happens at a place hangs on the seed, its position in the stream of tokens, and the token there
alone: whichever rank reads whatever part of a sequence, today or after a restart, finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalong.data.tokenizers.tokenizer import Tokenizer

IGNORE_INDEX = -100

# What to do where a vocabulary has as many rows as its tokenizer has ids without the mask token.
ADD_A_ROW = (
    "the mask token needs one row more: import the model (one of megalong: export it first) with"
    " tools/convert_from_hf.py --objective mlm --make-vocab-size-divisible-by 128"
)


@dataclass(frozen=True)
class Masking:
    """How tokens are masked.

    rate: the share that is chosen. mask: id of the mask token. is_text: of each id whether it
    stands for text, bool (vocab size,).
    """

    rate: float
    mask: int
    is_text: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float) -> Masking:
        """For a tokenizer with a mask token (`Tokenizer.with_mask`)."""
        assert tokenizer.mask is not None
        return cls(rate, tokenizer.mask, tokenizer.token_bytes() > 0)

    def masked(self, tokens: np.ndarray, begin: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees of consecutive tokens, and the labels: the token where it was chosen,
        else IGNORE_INDEX. All int64 (length,); begin: the first one's position in the stream."""
        words, text = _random_words(seed, begin, len(tokens)), np.flatnonzero(self.is_text)
        chosen = (words >> 32 < round(self.rate * 2**32)) & self.is_text[tokens]
        # The lower half of a word says which tenth it is in, and where in it.
        tenth, place = np.divmod((words & 0xFFFFFFFF) * 10, 2**32)
        other = text[(place * len(text)) >> 32]
        seen = np.where(tenth < 8, self.mask, np.where(tenth < 9, other, tokens))
        return np.where(chosen, seen, tokens), np.where(chosen, tokens, IGNORE_INDEX)


def _random_words(seed: int, begin: int, count: int) -> np.ndarray:
    """64 random bits of each position, uint64 (count,).

    Philox makes four words of each value of its counter; numpy promises that they stay the same.
    """
    skipped = begin % 4
    bits = np.random.Philox(key=seed, counter=begin // 4)
    return bits.random_raw(skipped + count)[skipped:]
