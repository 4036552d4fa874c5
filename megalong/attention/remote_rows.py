"""Attention of a shard's sparse queries to rows that came from other ranks, and its merging.

Shape suffixes: b batch, s sequence (the shard's), h query heads, d head_dim, m query rows, n key
rows, t streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def merge(out_bshd, lse_bsh, new_out_bshd, new_lse_bsh):
    """Two softmaxes over different keys as one (eq. 9-12); absent ones have log-sum-exp -inf."""
    # e^new / (e^old + e^new), and 0 where there is nothing on either side
    weight_bsh = torch.sigmoid(new_lse_bsh - lse_bsh).nan_to_num(0.0)
    merged_bshd = torch.lerp(out_bshd, new_out_bshd.to(out_bshd.dtype), weight_bsh[..., None])
    return merged_bshd, torch.logaddexp(lse_bsh, new_lse_bsh)


@dataclass(frozen=True)
class RemotePart:
    """Attention of the shard's sparse queries to remote rows: streams with equally many of each.

    Streams that agree in their numbers of queries, keys and query heads are one part.
    """

    query_rows: torch.Tensor  # (m, heads), positions in the shard
    heads: torch.Tensor  # (heads,), those of a stream side by side
    key_rows: torch.Tensor  # (n, streams), places in the list of rows

    def queries(self, x_bsh: torch.Tensor) -> torch.Tensor:
        """(batch, m, heads, ...) of a tensor (batch, shard, heads, ...)."""
        return x_bsh[:, self.query_rows, self.heads]

    def add_queries(self, x_bsh: torch.Tensor, part_bmh: torch.Tensor) -> None:
        x_bsh[:, self.query_rows, self.heads] += part_bmh.to(x_bsh.dtype)

    def keys(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, n, streams, head_dim) of the list of rows."""
        return rows[self.key_rows].permute(2, 3, 0, 1, 4).unbind()

    def put_keys(self, rows: torch.Tensor, dk_bntd, dv_bntd) -> None:
        """Write the gradients of keys and values into the list; no other part has these rows."""
        both = torch.stack((dk_bntd, dv_bntd)).permute(2, 3, 0, 1, 4)
        rows[self.key_rows] = both.to(rows.dtype)

    def merge(self, out_bshd, lse_bsh, new_out_bmhd, new_lse_bhm) -> None:
        """Merge the attention of `queries` into output and log-sum-exp, in place."""
        index = (slice(None), self.query_rows, self.heads)
        merged = merge(out_bshd[index], lse_bsh[index], new_out_bmhd, new_lse_bhm.mT)
        out_bshd[index], lse_bsh[index] = merged
