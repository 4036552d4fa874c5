"""A model's attention in plain PyTorch. Travels in the exported folder.

The attention of a layer has *parts* (`parts_longnet`), which are merged by their log-sum-exp: that
equals one softmax over the keys of all of them (LongNet, arXiv 2307.02486, eq. 9-12). Autograd
gives the gradient.

Shape letters: b batch, s positions, h query heads, k kv heads, d head_dim, f batch and segments,
g streams (kv heads at one offset), n rows of a part, m queries among them.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

NEVER = -1e30  # a log-sum-exp of nothing; finite, so that gradients are
TILE_SCORES = 2**20  # scores that are held at once


def attention(q_bshd, k_bskd, v_bskd, parts, start: int = 0, past=None, first_bs=None):
    """Causal attention of the positions from `start` on.

    past: for each part the rows of keys and of values, (b, g, n, d), that a position at `start`
        may see; what an earlier call returned. None where start is 0.
    first: for each position the place of the first one of its document; None: there is one.
    Returns the output, (b, s, h, d), and the rows for the next call.
    """
    out = lse = None
    present = []
    for number, part in enumerate(parts):
        new_out, new_lse, rows = part.attend(
            q_bshd, k_bskd, v_bskd, start, None if start == 0 else past[number], first_bs
        )
        present.append(rows)
        if out is None:
            out, lse = new_out, new_lse
        else:
            total = torch.logaddexp(lse, new_lse)
            out = out * torch.exp(lse - total) + new_out * torch.exp(new_lse - total)
            lse = total
    return out.to(q_bshd.dtype), present


def range_attention(q_bhmd, k_bgnd, v_bgnd, starts_m, stops_m):
    """Attention of queries to the key rows [start, stop) of each, and its log-sum-exp (b, h, m, 1);
    NEVER where there is none. Both ends grow with the query; they are (m,), or (b, h or 1, m). In
    tiles, as `causal_attention`."""
    heads, m = q_bhmd.shape[1:3]
    width = max(int((stops_m - starts_m).max()), 1)
    rows = min(max(TILE_SCORES // (heads * width), 1), width, m)
    results = []
    for first in range(0, m, rows):
        here = slice(first, first + rows)
        starts, stops = starts_m[..., here], stops_m[..., here]
        low = min(int(starts[..., 0].min()), k_bgnd.shape[2] - 1)
        keys = slice(low, max(int(stops[..., -1].max()), low + 1))
        inputs = q_bhmd[:, :, here], k_bgnd[:, :, keys], v_bgnd[:, :, keys]
        inputs += (starts - low)[..., None], (stops - low)[..., None]
        if torch.is_grad_enabled() and q_bhmd.requires_grad:
            results.append(
                checkpoint(_range_tile, *inputs, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            results.append(_range_tile(*inputs))
    return tuple(torch.cat(x, 2) for x in zip(*results, strict=True))


def _range_tile(q_bhmd, k_bgnd, v_bgnd, starts_m1, stops_m1):
    b, h, m, d = q_bhmd.shape
    g, n = k_bgnd.shape[1:3]
    scores = q_bhmd.reshape(b, g, h // g * m, d) @ k_bgnd.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(b, h, m, n)
    rows = torch.arange(n, device=scores.device)
    hidden = (rows < starts_m1) | (rows >= stops_m1)
    scores = (scores * d**-0.5).masked_fill(hidden, NEVER)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp_().to(v_bgnd.dtype).reshape(b, g, h // g * m, n)
    return (weights @ v_bgnd).reshape(b, h, m, d).to(lse.dtype), lse


def causal_attention(q_fhmd, k_fgnd, v_fgnd, low_fhm=None):
    """Causal attention of the last m of n rows, and its log-sum-exp (f, h, m, 1); both in at least
    float32. low: the first row that each query sees, its own or one before it."""
    return in_tiles(_tile, q_fhmd, k_fgnd, v_fgnd, causal=True, bounds=(low_fhm,))


def in_tiles(tile, q_fhmd, k_fgnd, v_fgnd, *more, causal: bool, bounds=()):
    """An attention of m rows, and its log-sum-exp (f, h, m, 1): a tile of queries at a time,
    computed again in the backward pass, so that memory stays linear.

    tile: of the queries of a tile (f, g, e, m, d), of keys, values, the bounds of these queries
        (f, g, e, m, 1), and `more`. causal: the queries are the last rows, and get the keys up to
        their tile's end. bounds: of all queries, (f, h, m) each, or None.
    """
    m = q_fhmd.shape[2]
    g, n = k_fgnd.shape[1:3]
    budget = max(TILE_SCORES // (q_fhmd.shape[1] * n), 1)
    rows = min(budget, m)
    # split, not slices: its backward puts the parts together once.
    size = max(budget // rows, 1)
    parts = (x.split(size) for x in (q_fhmd.unflatten(1, (g, -1)), k_fgnd, v_fgnd))
    lines = []
    for number, (q_part, k_part, v_part) in enumerate(zip(*parts, strict=True)):
        part = slice(number * size, (number + 1) * size)
        line, stop = [], n - m
        for q_tile in q_part.split(rows, 3):
            start, stop = stop, stop + q_tile.shape[3]
            keys, here = slice(stop if causal else n), slice(start - (n - m), stop - (n - m))
            of_tile = (
                x if x is None else x[part, :, here].unflatten(1, (g, -1))[..., None]
                for x in bounds
            )
            inputs = q_tile, k_part[:, :, keys], v_part[:, :, keys], *of_tile, *more
            if torch.is_grad_enabled() and q_fhmd.requires_grad:
                line.append(
                    checkpoint(tile, *inputs, use_reentrant=False, preserve_rng_state=False)
                )
            else:
                line.append(tile(*inputs))
        lines.append([torch.cat(x, 3) for x in zip(*line, strict=True)])
    return tuple(torch.cat(x).flatten(1, 2) for x in zip(*lines, strict=True))


def _tile(q_fgemd, k_fgnd, v_fgnd, low_fgem1):
    f, g, e, m, d = q_fgemd.shape
    n = k_fgnd.shape[2]
    scores = q_fgemd.reshape(f, g, e * m, d) @ k_fgnd.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(f, g, e, m, n)
    later = torch.ones(m, m, dtype=torch.bool, device=scores.device).triu(1)
    scores.mul_(d**-0.5)[..., n - m :].masked_fill_(later, -torch.inf)
    if low_fgem1 is not None:
        scores.masked_fill_(torch.arange(n, device=scores.device) < low_fgem1, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp_().to(v_fgnd.dtype).reshape(f, g, e * m, n)
    return (weights @ v_fgnd).reshape(f, g, e, m, d).to(lse.dtype), lse


def probabilities(q_bshd, k_bskd, parts, seen_b1ss=None):
    """The weight of each key in each query's softmax, (b, h, s, s) in at least float32: that of all
    parts which have it. Quadratic, to be looked at; `attention` has no such thing. seen: which keys
    are of the query's document."""
    s, heads = q_bshd.shape[1:3]
    q_bhsd = q_bshd.transpose(1, 2)
    k_bhsd = k_bskd.transpose(1, 2).repeat_interleave(heads // k_bskd.shape[2], 1)
    scores = q_bhsd @ k_bhsd.mT * q_bshd.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    times_hss = torch.zeros(heads, s, s, dtype=scores.dtype, device=scores.device)
    for part in parts:
        times_hss += part.pairs(s, scores.device).repeat_interleave(heads // len(part.streams), 0)
    times_hss.tril_()
    if seen_b1ss is not None:
        times_hss = times_hss * seen_b1ss
    weights = (scores + times_hss.log().clamp_min(NEVER)).softmax(-1)
    return weights * (times_hss > 0)
