"""A model's attention where it looks both ways, in plain PyTorch. Travels in the exported folder.

The parts are those of `parts_longnet`, and are merged in the same way. There is no cache: each
token sees later ones too. So do queries see the end of their sequence, and what is no position has
to be hidden from them: rows that fill up a segment, and padding.

Shape letters: as in `attention_longnet`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .attention_longnet import NEVER, in_tiles, range_attention
from .documents_longnet import Documents
from .parts_longnet import Branch, Columns, Window, pieces


def bidirectional_attention(
    q_bshd, k_bskd, v_bskd, parts, counts: list[int], documents: Documents | None = None
):
    """The output, (b, s, h, d). counts: how many real tokens each sequence has, the others being
    padding after them, whose output is zero. documents: those that share a sequence."""
    out_bshd = torch.zeros_like(q_bshd)
    for rows, count in sequences_by_length(counts, q_bshd.device):
        q, k, v = (x[rows, :count] for x in (q_bshd, k_bskd, v_bskd))
        bounds = None
        if documents is not None:
            bounds = [x[rows, :count] for x in (documents.first_bs, documents.stop_bs)]
        out = lse = None
        for part in parts:
            for new_out, new_lse in _attend(part, q, k, v, bounds):
                if out is None:
                    out, lse = new_out, new_lse
                    continue
                total = torch.logaddexp(lse, new_lse)
                out = out * torch.exp(lse - total) + new_out * torch.exp(new_lse - total)
                lse = total
        places = rows[:, None], torch.arange(count, device=rows.device)
        out_bshd = out_bshd.index_put(places, out.to(q_bshd.dtype))
    return out_bshd


def bidirectional_probabilities(
    q_bshd, k_bskd, parts, counts: list[int], documents: Documents | None = None
):
    """The weight of each key in each query's softmax, (b, h, s, s) in at least float32, zero where
    one of them is padding. Quadratic, to be looked at."""
    batch, s, heads = q_bshd.shape[:3]
    dtype, device = torch.promote_types(q_bshd.dtype, torch.float32), q_bshd.device
    found = torch.zeros(batch, heads, s, s, dtype=dtype, device=device)
    for rows, count in sequences_by_length(counts, device):
        q_bhsd = q_bshd[rows, :count].transpose(1, 2)
        k_bhsd = k_bskd[rows, :count].transpose(1, 2)
        k_bhsd = k_bhsd.repeat_interleave(heads // k_bhsd.shape[1], 1)
        scores = (q_bhsd @ k_bhsd.mT * q_bshd.shape[-1] ** -0.5).to(dtype)
        times_hss = torch.zeros(heads, count, count, dtype=dtype, device=device)
        for part in parts:
            seen_gss = _pairs(part, count, device)
            times_hss += seen_gss.repeat_interleave(heads // len(part.streams), 0)
        if documents is not None:
            times_hss = times_hss * documents.seen(count)[rows, :, :count]
        weights = (scores + times_hss.log().clamp_min(NEVER)).softmax(-1) * (times_hss > 0)
        found[rows, :, :count, :count] = weights
    return found


def sequences_by_length(counts: list[int], device) -> Iterator[tuple[torch.Tensor, int]]:
    """The sequences of a batch that have equally many tokens, which are computed together."""
    for count in sorted({*counts} - {0}):
        rows = [row for row, its_count in enumerate(counts) if its_count == count]
        yield torch.tensor(rows, device=device), count


def _attend(part: Branch | Window | Columns, q_bshd, k_bskd, v_bskd, bounds) -> list[tuple]:
    """Output and log-sum-exp of whole sequences, (b, s, h, d or 1); of a part that is two ranges,
    of either. bounds: the places between which the keys of each query lie, (b, s) both, or None."""
    if isinstance(part, Branch):
        return [_branch(part, q_bshd, k_bskd, v_bskd, bounds)]
    q_bhsd, keys = q_bshd.transpose(1, 2), [k_bskd.transpose(1, 2), v_bskd.transpose(1, 2)]
    places = torch.arange(q_bshd.shape[1], device=q_bshd.device)
    if isinstance(part, Window):
        first, stop = places - part.size + 1, places + part.size
        ranges = [(first.clamp_min(0), stop.clamp_max(len(places)))]
        bounds = bounds and [x[:, None] for x in bounds]
    else:
        keys = [_column_rows(part, x) for x in keys]
        columns = keys[0].shape[2]
        if columns == 0:  # no whole block
            return []
        before = places // part.block * part.columns  # those of earlier blocks
        after = (before + part.columns).clamp_max(columns)  # where those of later ones begin
        nothing, everything = torch.zeros_like(places), torch.full_like(places, columns)
        ranges = [(nothing, before), (after, everything)]
        bounds = bounds and [part.rows_before(x).clamp_max(columns) for x in bounds]
    if bounds:
        low, high = bounds
        ranges = [(torch.maximum(a, low), torch.minimum(b, high)) for a, b in ranges]
    results = (range_attention(q_bhsd, *keys, *ends) for ends in ranges)
    return [(out.transpose(1, 2), lse.transpose(1, 2)) for out, lse in results]


def _branch(part: Branch, q_bshd, k_bskd, v_bskd, bounds):
    batch, count = q_bshd.shape[:2]
    found = []
    for first, segments, size, _ in pieces(0, count, part.length):
        here = slice(first, first + segments * size)
        rows = [part.key_rows(x[:, here], segments, 0, None) for x in (k_bskd, v_bskd)]
        places = torch.arange(rows[0].shape[2], device=q_bshd.device) * part.rate
        hidden_gn = places + part.offsets(q_bshd.device)[:, None] >= size
        ranges = [part.rows_before(x[:, here], first, segments, 0) for x in bounds or ()]
        results = _row_attention(
            part.query_rows(q_bshd[:, here], segments, 0), *rows, hidden_gn, ranges or (None, None)
        )
        found.append(
            [
                part.to_positions(x, batch, size, 0, missing)
                for x, missing in zip(results, (0.0, NEVER), strict=True)
            ]
        )
    return tuple(torch.cat(x, 1) for x in zip(*found, strict=True))


def _column_rows(part: Columns, x_bksd):
    """The rows of the columns of all whole blocks, (b, k, n, d), one block's after the other's."""
    blocks = x_bksd.shape[2] // part.block
    starts = torch.tensor(part.starts, device=x_bksd.device)
    block = torch.arange(blocks, device=x_bksd.device) * part.block
    inside = torch.arange(part.columns, device=x_bksd.device)
    places_kn = (starts[:, None, None] + block[:, None] + inside).flatten(1)
    heads = torch.arange(len(starts), device=x_bksd.device)[:, None]
    return x_bksd[:, heads, places_kn]


def _pairs(part: Branch | Window | Columns, length: int, device):
    """Which keys the queries see, (g, length, length)."""
    if isinstance(part, Branch):
        return part.pairs(length, device)
    if isinstance(part, Window):
        seen_gss = part.pairs(length, device)  # as far back
        return seen_gss & seen_gss.mT
    takes_sg, _ = part.writes(torch.arange(length, device=device))
    block_s = torch.arange(length, device=device) // part.block
    seen_ss = (block_s != block_s[:, None]) & (block_s < length // part.block)
    return takes_sg.T[:, None] & seen_ss


def _row_attention(q_fhmd, k_fgnd, v_fgnd, hidden_gn, ranges):
    """Attention of all rows to all that are not hidden and, where there are ranges, lie between the
    query's two; and its log-sum-exp (f, h, m, 1). Both in at least float32."""
    return in_tiles(_tile, q_fhmd, k_fgnd, v_fgnd, hidden_gn, causal=False, bounds=ranges)


def _tile(q_fgemd, k_fgnd, v_fgnd, low_fgem1, high_fgem1, hidden_gn):
    f, g, e, m, d = q_fgemd.shape
    n = k_fgnd.shape[2]
    scores = q_fgemd.reshape(f, g, e * m, d) @ k_fgnd.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * d**-0.5
    scores = scores.masked_fill(hidden_gn[:, None], NEVER)
    if low_fgem1 is not None:
        rows = torch.arange(n, device=scores.device)
        outside = (rows < low_fgem1) | (rows >= high_fgem1)
        scores = scores.masked_fill(outside.reshape(f, g, e * m, n), NEVER)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp_().to(v_fgnd.dtype)
    out = (weights @ v_fgnd).to(lse.dtype)
    return out.reshape(f, g, e, m, d), lse.reshape(f, g, e, m, 1)
