"""Documents that share a sequence: no query sees a key of another document than its own.

A document is a run of neighbouring positions, and every position knows where its own begins. So
each query has bounds for its keys, one integer or two, however many documents there are: no mask is
ever built, segments and offsets keep their places in the sequence, and neither tables nor what
ranks exchange depend on documents.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h heads, m query rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Documents:
    """Where in the whole sequence the document of each position lies. int32, not decreasing along
    s; rows of the batch differ freely.

    start_bs: the place of its first position; where it changes, another document begins.
    stop_bs: the place after its last position. None where attention is causal, which needs none.
    """

    start_bs: torch.Tensor
    stop_bs: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class RowRanges:
    """The key rows [start, stop) of which each query row sees those that its band gives it. int32
    (batch, heads or 1, m), not decreasing along m, between 0 and the number of key rows; None
    bounds nothing. A range may be empty."""

    start_bhm: torch.Tensor | None = None
    stop_bhm: torch.Tensor | None = None


def documents_of(start_bs: torch.Tensor | None, stop_bs: torch.Tensor | None) -> Documents | None:
    """Both bounds as one object; None where documents are not kept apart.

    Raises ValueError where the first is missing."""
    if start_bs is None and stop_bs is not None:
        raise ValueError("document_stop is given without document_start: give both")
    return None if start_bs is None else Documents(start_bs, stop_bs)


def check_documents(documents: Documents | None, q_bshd: torch.Tensor, causal: bool) -> None:
    """Raise ValueError, naming the argument to change, unless they are those of the positions of q.

    What the numbers are is not looked at: they may lie on a GPU."""
    if documents is None:
        return
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


def refuse_documents(documents: Documents | None) -> None:
    """Raise ValueError where there are any."""
    if documents is not None:
        raise ValueError("documents are not kept apart here yet: give documents=None")
