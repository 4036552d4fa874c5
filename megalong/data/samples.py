"""What a run trains on: samples of one length, by number, each from one of some sources."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megalong.data.context import ContextReport


def place_type(length: int) -> type[np.integer]:
    """The integers that hold the places [0, length] of a sample: of 32 bits where these do."""
    return np.int32 if length <= np.iinfo(np.int32).max else np.int64


class Samples(Protocol):
    """An endless row of samples of `sequence_length` + 1 tokens, which nothing but the data, the
    seed and the number of a sample decide: whoever reads whatever part of it finds the same.

    tokens_per_epoch, samples_per_epoch: those that come before any is repeated; of several sources
        the sums over them.
    sources: their names; those of a blend are several.
    masks_loss: whether some tokens may not count in the loss.
    """

    sequence_length: int
    seed: int
    tokens_per_epoch: int
    sources: tuple[str, ...]

    @property
    def samples_per_epoch(self) -> int: ...

    @property
    def masks_loss(self) -> bool: ...

    def sample(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of sample i, in [0, N + 1); stop None: N + 1.

        Returns int64 (stop - start,). Reads only these tokens.
        """
        ...

    def loss_mask(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Which of these tokens count in the loss, that is, are to be predicted, bool
        (stop - start,). Reads only what it says of them."""
        ...

    def source(self, i: int) -> int:
        """Which of `sources` sample i is from."""
        ...

    def document_bounds(
        self, i: int, start: int = 0, stop: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of tokens [start, stop) of sample i begin and end, as places in the
        sample in [0, N]; `place_type(N)` (stop - start,) each. Reads no tokens."""
        ...

    def context_report(self) -> ContextReport:
        """How much real context the tokens of the first epoch have. It looks at the lengths of all
        documents."""
        ...
