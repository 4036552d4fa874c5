"""Documents that share a sequence: no query sees a key of another document than its own.

A document is a run of neighbouring positions, and every position knows where its own begins. So
each query has bounds for its keys, one integer or two, however many documents there are: no mask is
ever built, segments and offsets keep their places in the sequence, and neither tables nor what
ranks exchange depend on documents.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h heads, m query rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalong.attention.tensors import kept_with_tensor


@dataclass(frozen=True, eq=False)
class RowRanges:
    """The key rows [start, stop) of which each query row sees those that its band gives it. int32
    (batch, heads or 1, m), not decreasing along m, between 0 and the number of key rows; None
    bounds nothing. A range may be empty."""

    start_bhm: torch.Tensor | None = None
    stop_bhm: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Documents:
    """Where in the whole sequence the document of each position lies. int32, not decreasing along
    s; rows of the batch differ freely.

    start_bs: the place of its first position; where it changes, another document begins.
    stop_bs: the place after its last position. None where attention is causal, which needs none.
    """

    start_bs: torch.Tensor
    stop_bs: torch.Tensor | None = None

    def within(self, positions: slice, first: int) -> Documents:
        """Those of a slice of the positions, with places counted from its first one, which has the
        place `first`; documents that reach beyond it end with it."""
        where = positions.start, positions.stop, first
        bounds = (self.start_bs, self.stop_bs)
        return Documents(*(x if x is None else _within(x, *where) for x in bounds))

    def ranges(self, rows_before: Callable[..., torch.Tensor], *arguments) -> RowRanges:
        """The ranges of queries among key rows that lie in order of their places.

        rows_before: called with a bound (batch, s) and the arguments; how many of the key rows lie
        before it, int32 (batch, heads or 1, m)."""
        bounds = (self.start_bs, self.stop_bs)
        return RowRanges(*(x if x is None else rows_before(x, *arguments) for x in bounds))


@kept_with_tensor
def _within(bound_bs: torch.Tensor, start: int, stop: int, first: int) -> torch.Tensor:
    return (bound_bs[:, start:stop] - first).clamp(0, stop - start)


@kept_with_tensor
def places_before(
    bound_bs: torch.Tensor, start: int, stop: int, first: int, count: int
) -> torch.Tensor:
    """`rows_before` of the queries [start, stop), where the key rows are so many places from
    `first` on."""
    return (bound_bs[:, start:stop] - first).clamp(0, count)[:, None]


def documents_of(start_bs: torch.Tensor | None, stop_bs: torch.Tensor | None) -> Documents | None:
    """Both bounds as one object; None where documents are not kept apart.

    Raises ValueError where the first is missing."""
    if start_bs is None and stop_bs is not None:
        raise ValueError("document_stop is given without document_start: give both")
    return None if start_bs is None else Documents(start_bs, stop_bs)


def ranges_of(start_bhm: torch.Tensor | None, stop_bhm: torch.Tensor | None) -> RowRanges | None:
    """Both bounds as one object; None where there is none."""
    return None if start_bhm is stop_bhm is None else RowRanges(start_bhm, stop_bhm)


def copied(documents: Documents | None) -> Documents | None:
    """Those of a caller who may write to the tensors in ways that nobody sees (`kept_with_tensor`),
    as they are now."""
    if documents is None:
        return None
    stop_bs = documents.stop_bs
    return Documents(documents.start_bs.clone(), None if stop_bs is None else stop_bs.clone())


def checked_documents(
    documents: Documents | None, q_bshd: torch.Tensor, causal: bool
) -> Documents | None:
    """What of them is to be computed with. Raises ValueError, naming the argument to change, unless
    they are those of the positions of q. What the numbers are is not looked at: they may lie on a
    GPU."""
    if documents is None:
        return None
    if documents.stop_bs is None and not causal:
        raise ValueError("document_stop is missing: without a causal mask it is needed")
    for name, x in (("document_start", documents.start_bs), ("document_stop", documents.stop_bs)):
        if x is None:
            continue
        if x.shape != q_bshd.shape[:2] or x.dtype != torch.int32 or x.device != q_bshd.device:
            raise ValueError(
                f"{name} must be (batch, sequence), int32 {tuple(q_bshd.shape[:2])} on"
                f" {q_bshd.device}, got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
    return Documents(documents.start_bs, None if causal else documents.stop_bs)
