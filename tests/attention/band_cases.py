"""Random bands, and the pairs that they have by their definition."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from megalong.attention.documents import RowRanges
from megalong.attention.patterns import Band

SCALE = 0.3
LEAST = -1e300  # the score of a key that is not seen; finite, so that gradients are


@dataclass(frozen=True)
class BandCase:
    """Some query rows and key rows in a band."""

    band: Band
    queries: int
    keys: int
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    head_dim: int = 8
    seed: int = 0

    def seen(self) -> torch.Tensor:
        """(queries, keys) booleans: the query sees the key. From the definition."""
        band = self.band
        block = (band.first + torch.arange(self.queries)[:, None]) // band.query_block
        key = torch.arange(self.keys)
        seen = torch.ones(self.queries, self.keys, dtype=torch.bool)
        if band.before is not None:
            seen &= (block - band.before) * band.key_block <= key
        if band.after is not None:
            seen &= key < (block + band.after) * band.key_block
        return seen

    def inputs(self, dtype=torch.float64, device="cpu"):
        """q, k, v and the output's gradient, each (batch, rows, heads, head_dim)."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.queries, self.heads),
            (self.keys, self.kv_heads),
            (self.keys, self.kv_heads),
            (self.queries, self.heads),
        )
        return [
            torch.randn(
                self.batch, rows, heads, self.head_dim, generator=generator, dtype=torch.float64
            ).to(device, dtype)
            for rows, heads in shapes
        ]


def random_case(seed: int, longest: int = 60) -> BandCase:
    """Windows and staircases of any shape, also beside all keys."""
    draw = random.Random(seed)
    query_block = key_block = 1
    if draw.random() < 0.4:
        query_block, key_block = draw.randint(1, longest // 4), draw.randint(1, longest // 6)
    while True:
        before, after = (draw.choice((None, 1, draw.randint(-3, longest))) for _ in range(2))
        if None in (before, after) or before + after > 0:
            break
    kv_heads = draw.choice((1, 2))
    return BandCase(
        Band(before, after, draw.choice((0, draw.randint(0, longest))), query_block, key_block),
        queries=draw.randint(1, longest),
        keys=draw.randint(1, longest),
        batch=draw.choice((1, 2)),
        heads=kv_heads * draw.choice((1, 2)),
        kv_heads=kv_heads,
        seed=seed,
    )


def run_band(
    case: BandCase, backend, inputs, ranges: RowRanges | None = None
) -> list[torch.Tensor]:
    """Output, log-sum-exp, and the shares (dq, dk, dv) of the gradient of a softmax over these keys
    and others, by a backend's two functions."""
    q, k, v, grad = inputs
    options = {"scale": SCALE, "ranges": ranges}
    out, lse = backend.attend_rows(q, k, v, case.band, **options)
    of_others, lse_of_others = _others(case, out, lse)
    merged = torch.logaddexp(lse, lse_of_others)
    share = torch.exp(lse - merged).mT[..., None].to(out.dtype)
    whole = out * share + of_others * (1 - share)
    shares = backend.attend_rows_backward(grad, q, k, v, whole, merged, case.band, **options)
    return [out, lse, *shares]


def run_definition(case: BandCase, inputs, ranges: RowRanges | None = None) -> list[torch.Tensor]:
    """The same by autograd, from masked scores, in float64."""
    *qkv, grad = (x.detach().double() for x in inputs)
    q, k, v = (x.requires_grad_() for x in qkv)
    group = case.heads // case.kv_heads
    q_bhid, k_bhjd, v_bhjd = (
        x.repeat_interleave(times, 2).transpose(1, 2)
        for x, times in ((q, 1), (k, group), (v, group))
    )
    seen, key = case.seen()[None, None].to(q.device), torch.arange(case.keys, device=q.device)
    if ranges is not None and ranges.start_bhm is not None:
        seen = seen & (ranges.start_bhm[..., None] <= key)
    if ranges is not None and ranges.stop_bhm is not None:
        seen = seen & (key < ranges.stop_bhm[..., None])
    hidden = ~seen
    scores = (q_bhid @ k_bhjd.mT * SCALE).masked_fill(hidden, LEAST)
    lse = scores.logsumexp(-1)
    out = (scores.softmax(-1).masked_fill(hidden, 0.0) @ v_bhjd).transpose(1, 2)
    of_others, lse_of_others = _others(case, out, lse)
    share = torch.sigmoid(lse - lse_of_others).mT[..., None]
    whole = out * share + of_others * (1 - share)
    gradients = torch.autograd.grad(whole, (q, k, v), grad)
    return [out.detach(), lse.detach().masked_fill(hidden.all(-1), -torch.inf), *gradients]


def _others(case: BandCase, out: torch.Tensor, lse: torch.Tensor):
    """Output and log-sum-exp over keys that are elsewhere: constants, about as large as those
    here."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
        for x in (out, lse)
    ]


def random_ranges(case: BandCase, seed: int, device="cpu") -> RowRanges:
    """Ranges that grow row by row or in steps: one for all heads or one for each, some of them
    empty, or with no end on one side."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    shape = (2, case.batch, draw.choice((1, case.heads)), case.queries)
    step = draw.choice((1, 6, 16))
    ends = torch.randint(0, case.keys + 1, shape, generator=generator) // step * step
    start_bhm, stop_bhm = ends.sort(-1).values.to(device, torch.int32)
    both = (start_bhm, stop_bhm)
    return RowRanges(*draw.choice((both, both, (start_bhm, None), (None, stop_bhm))))
