"""What the kernels read of documents, and of ranges of rows: of every row the range that it sees.

The forward kernel and that of dq read the range of keys that each query sees, that of dk and dv the
range of queries that see each key. Documents are the same either way. Both ends of a range grow
along the rows, so ranges turn round by a search; it runs on the device, once for a batch, and
nothing waits for it.

Shape suffixes: b batch, s sequence, h heads or 1, m query rows, n key rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalong.attention.documents import Documents, RowRanges
from megalong.attention.tensor_cache import kept_with_tensor


class Ranges(NamedTuple):
    """int32 (batch, heads or 1, rows), contiguous: a row sees those of the other side from its
    start on and before its stop; None where all are."""

    start: torch.Tensor | None = None
    stop: torch.Tensor | None = None

    @property
    def heads(self) -> int | None:
        """How many lines of ranges a batch row has."""
        return next((x.shape[1] for x in self if x is not None), None)


NO_RANGES = Ranges()


def ranges_of(*ends: torch.Tensor | None) -> Ranges:
    return Ranges(*(None if x is None else x.contiguous() for x in ends))


def keys_in_documents(documents: Documents | None, causal: bool) -> Ranges:
    """The places of the keys that each query sees; causality is not among them."""
    if documents is None:
        return NO_RANGES
    stop_bs = documents.stop_bs
    return ranges_of(
        documents.start_bs[:, None], None if causal or stop_bs is None else stop_bs[:, None]
    )


def queries_in_documents(documents: Documents | None, causal: bool) -> Ranges:
    """The places of the queries that see each key; causality is not among them."""
    if documents is None:
        return NO_RANGES
    start_bs, stop_bs = documents.start_bs, documents.stop_bs
    stop_bs = _stops(start_bs) if stop_bs is None else stop_bs
    return ranges_of(None if causal else start_bs[:, None], stop_bs[:, None])


def keys_in_ranges(ranges: RowRanges | None) -> Ranges:
    """The key rows that each query row sees."""
    return NO_RANGES if ranges is None else ranges_of(ranges.start_bhm, ranges.stop_bhm)


def queries_in_ranges(ranges: RowRanges | None, keys: int) -> Ranges:
    """The query rows that see each of so many key rows."""
    if ranges is None:
        return NO_RANGES
    ends = (ranges.stop_bhm, ranges.start_bhm)
    return Ranges(*(None if x is None else _rows_up_to(x, keys) for x in ends))


@kept_with_tensor
def _stops(start_bs: torch.Tensor) -> torch.Tensor:
    """Where documents stop: where the next one starts."""
    start_bs = start_bs.contiguous()
    return torch.searchsorted(start_bs, start_bs, right=True, out_int32=True)


@kept_with_tensor
def _rows_up_to(end_bhm: torch.Tensor, keys: int) -> torch.Tensor:
    """(batch, heads or 1, keys): of how many query rows the end is at most this key row."""
    key_n = torch.arange(keys, dtype=torch.int32, device=end_bhm.device)
    key_bhn = key_n.expand(*end_bhm.shape[:2], keys).contiguous()
    return torch.searchsorted(end_bhm.contiguous(), key_bhn, right=True, out_int32=True)
