"""The PyTorch backend: dense attention on strided views, merged by log-sum-exp.

Inside one segment the rows that take part form a smaller sequence whose neighbours lie r rows
apart, and on it dilated attention is plain dense attention. So nothing is gathered: `plan` cuts a
pattern into a few blocks, each of which is one strided view (batch, segments, rows, heads,
head_dim) of q, k and v, and a dense attention that also returns its log-sum-exp runs on each.

Forward: partial results are merged into one running output and log-sum-exp (LongNet, arXiv
2307.02486, eq. 9-12). Backward: with the MERGED output and log-sum-exp, each block's own backward
gives its share of the exact gradient, P = exp(s - lse) and dS = P * (dP - rowsum(dO * O)); the
shares only add. Only q, k, v, output and log-sum-exp are kept between the two.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim, c segments of a block,
n rows of a segment, f batch and segments folded together.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from megalong.attention.pattern import DilatedPattern
from megalong.attention.sdpa_bands import attend_band, attend_band_backward
from megalong.attention.sdpa_operators import attend, attend_backward
from megalong.attention.tensor_cache import PATTERNS

# ------------------------------------------------------------------------------ the backend


def unsupported(device, dtype, head_dim) -> None:
    return None


def forward(q_bshd, k_bsgd, v_bsgd, pattern, *, causal, scale):
    q_bshd, k_bsgd, v_bsgd = map(_dense_rows, (q_bshd, k_bsgd, v_bsgd))
    (batch, length, heads, _), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    blocks = plan(pattern, length, heads, kv_heads) if q_bshd.numel() else ()

    if not (blocks and blocks[0].whole):
        out_bshd = q_bshd.new_zeros(q_bshd.shape, dtype=dtype)
        lse_bsh = q_bshd.new_full((batch, length, heads), -torch.inf, dtype=dtype)
    for block in blocks:
        out_fhnd, lse_fhn = attend(
            block.fold(q_bshd), block.fold_kv(k_bsgd), block.fold_kv(v_bsgd), causal, scale
        )
        out_bcnhd, lse_bcnh = block.unfold(out_fhnd, batch), block.unfold(lse_fhn, batch)
        if block.whole:  # its result becomes the running one
            out_bshd = out_bcnhd.reshape(q_bshd.shape).to(dtype)
            lse_bsh = lse_bcnh.reshape(batch, length, heads)
        elif block.first:
            block.view(out_bshd).copy_(out_bcnhd)
            block.view(lse_bsh).copy_(lse_bcnh)
        else:
            _merge(block.view(out_bshd), block.view(lse_bsh), out_bcnhd.to(dtype), lse_bcnh)
    return out_bshd.to(q_bshd.dtype), lse_bsh.transpose(1, 2)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, pattern, *, causal, scale
):  # fmt: skip
    q_bshd, k_bsgd, v_bsgd, grad_bshd = map(_dense_rows, (q_bshd, k_bsgd, v_bsgd, grad_bshd))
    lse_bsh = lse_bhs.transpose(1, 2)
    inputs = (q_bshd, k_bsgd, v_bsgd)
    (batch, length, heads, _), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    dtype = torch.promote_types(q_bshd.dtype, torch.float32)
    blocks = plan(pattern, length, heads, kv_heads) if q_bshd.numel() else ()

    adopts = blocks and blocks[0].whole and heads == kv_heads
    if not adopts:
        totals = [x.new_zeros(x.shape, dtype=dtype) for x in inputs]
    for block in blocks:
        q_fhnd, k_fhnd, v_fhnd = block.fold(q_bshd), block.fold_kv(k_bsgd), block.fold_kv(v_bsgd)
        parts = attend_backward(
            block.fold(grad_bshd), q_fhnd, k_fhnd, v_fhnd, block.fold(out_bshd),
            block.fold(lse_bsh), causal, scale,
        )  # fmt: skip
        dq_bcnhd, dk_bcnhd, dv_bcnhd = parts = [block.unfold(part, batch) for part in parts]
        if block.whole and adopts:
            totals = [
                part.reshape(x.shape).to(dtype) for part, x in zip(parts, inputs, strict=True)
            ]
        else:
            block.view(totals[0]).add_(dq_bcnhd)
            block.view_kv(totals[1]).add_(block.sum_shared(dk_bcnhd, dtype))
            block.view_kv(totals[2]).add_(block.sum_shared(dv_bcnhd, dtype))
    return tuple(total.to(q_bshd.dtype) for total in totals)


def attend_rows(q_bmhd, k_bngd, v_bngd, band, *, scale):
    q_bmhd, k_bngd, v_bngd = map(_dense_rows, (q_bmhd, k_bngd, v_bngd))
    out_bhmd, lse_bhm = attend_band(*_per_head(q_bmhd, k_bngd, v_bngd), band, scale)
    return out_bhmd.transpose(1, 2).to(q_bmhd.dtype), lse_bhm


def attend_rows_backward(grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, band, *, scale):
    grad_bmhd, q_bmhd, k_bngd, v_bngd = map(_dense_rows, (grad_bmhd, q_bmhd, k_bngd, v_bngd))
    grad_bhmd, out_bhmd = grad_bmhd.transpose(1, 2), out_bmhd.transpose(1, 2)
    dq_bhmd, *shares = attend_band_backward(
        grad_bhmd, *_per_head(q_bmhd, k_bngd, v_bngd), out_bhmd, lse_bhm, band, scale
    )
    kv_heads = k_bngd.shape[2]
    dk_bgnd, dv_bgnd = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in shares)
    return dq_bhmd.transpose(1, 2), dk_bgnd.transpose(1, 2), dv_bgnd.transpose(1, 2)


def _per_head(q_bmhd, k_bngd, v_bngd):
    """q, k and v as (batch, heads, rows, head_dim), the keys of a group repeated for its heads."""
    group = q_bmhd.shape[2] // k_bngd.shape[2]
    k_bnhd, v_bnhd = (x.repeat_interleave(group, dim=2) for x in (k_bngd, v_bngd))
    return tuple(x.transpose(1, 2) for x in (q_bmhd, k_bnhd, v_bnhd))


def _dense_rows(x_bshd):
    """The operators want the numbers of a row side by side; every other stride is free."""
    return x_bshd if x_bshd.stride(-1) == 1 else x_bshd.contiguous()


def _merge(out_bcnhd, lse_bcnh, new_out_bcnhd, new_lse_bcnh):
    """Merge a partial softmax into the running one, in place.

    The weight of the new part is e^new / (e^old + e^new) = sigmoid(new - old): 1 where nothing
    was there yet (old = -inf).
    """
    out_bcnhd.lerp_(new_out_bcnhd, torch.sigmoid(new_lse_bcnh - lse_bcnh)[..., None])
    torch.logaddexp(lse_bcnh, new_lse_bcnh, out=lse_bcnh)


# --------------------------------------------------------------------------------- the plan


class Progression(NamedTuple):
    """Heads that one strided view can reach: head, kv head and offset each grow by a step."""

    head: int
    kv_head: int
    offset: int
    head_step: int
    kv_step: int
    offset_step: int
    count: int


@dataclass(frozen=True)
class Block:
    """One dense attention: segments of one length in a row, of heads with equally many rows."""

    start: int  # of the first segment
    segments: int
    segment_length: int
    rate: int  # distance between two rows
    rows: int
    heads: Progression
    first: bool  # of the first branch: no other branch has written its rows yet
    whole: bool  # of the first branch, and every row of every head

    @property
    def shared(self) -> bool:
        """Its query heads all read the same rows of one kv head, through a stride of 0."""
        h = self.heads
        return h.count > 1 and h.kv_step == 0 and h.offset_step == 0

    def view(self, x_bsh):
        """x (batch, sequence, query heads, ...) -> (batch, segments, rows, heads, ...), a view."""
        return self._strided(x_bsh, self.heads.head, self.heads.head_step, self.heads.count)

    def view_kv(self, x_bsg):
        """`view` of a k or v, where shared rows appear once: heads is then 1."""
        count = 1 if self.shared else self.heads.count
        return self._strided(x_bsg, self.heads.kv_head, self.heads.kv_step, count)

    def fold(self, x_bsh):
        """A view's (batch * segments, heads, rows, ...), copied only if strides forbid a view."""
        return self.view(x_bsh).transpose(2, 3).flatten(0, 1)

    def fold_kv(self, x_bsg):
        x_fhnd = self.view_kv(x_bsg).transpose(2, 3).flatten(0, 1)
        return x_fhnd.expand(-1, self.heads.count, -1, -1)

    def unfold(self, x_fhn, batch: int):
        """(batch * segments, heads, rows, ...) -> (batch, segments, rows, heads, ...)."""
        return x_fhn.unflatten(0, (batch, self.segments)).transpose(2, 3)

    def sum_shared(self, x_bcnhd, dtype):
        """The gradients of shared rows, summed over the query heads that read them."""
        return x_bcnhd.sum(3, keepdim=True, dtype=dtype) if self.shared else x_bcnhd

    def _strided(self, x, head, head_step, count):
        h, (batch, row, next_head, *rest) = self.heads, x.stride()
        shape = (x.shape[0], self.segments, self.rows, count, *x.shape[3:])
        diagonal = head_step * next_head + h.offset_step * row
        strides = (batch, self.segment_length * row, self.rate * row, diagonal, *rest)
        start = x.storage_offset() + (self.start + h.offset) * row + head * next_head
        return x.as_strided(shape, strides, start)


@lru_cache(maxsize=PATTERNS)
def plan(pattern: DilatedPattern, length: int, heads: int, kv_heads: int) -> tuple[Block, ...]:
    """The blocks of a pattern on sequences of `length`; branches of the smallest rate first."""
    offsets = pattern.offsets(heads, kv_heads)
    order = sorted(range(len(offsets)), key=lambda branch: pattern.dilation_rates[branch])
    blocks = []
    for branch in order:
        width, rate = pattern.branches[branch]
        count, rest = divmod(length, width)
        # The whole segments, then what is left of the last one.
        for start, segments, segment in ((0, count, width), (length - rest, 1, rest)):
            if not segments * segment:
                continue
            # Beyond r only the remainder decides which heads have one row more than others.
            reduced = segment if segment < rate else rate + segment % rate
            for run in equal_heads(offsets[branch], heads // kv_heads, reduced, rate):
                rows = len(range(run.offset, segment, rate))
                whole = (rows * segments, run.count) == (length, heads)
                first = branch == order[0]
                blocks.append(
                    Block(start, segments, segment, rate, rows, run, first, whole and first)
                )
    return tuple(blocks)


@lru_cache(maxsize=1024)
def equal_heads(offsets, group: int, segment: int, rate: int) -> tuple[Progression, ...]:
    """Cut the query heads that have rows in a segment into progressions of equally many rows.

    Greedy: of the progressions that begin with the first head left, take the longest. With the
    "mod" rule that gives min(r, heads / r) calls instead of one per offset: heads 0, 1, 2, ... of
    offsets 0, 1, 2, ... lie on a diagonal, which is a stride as good as any other.
    """
    heads_with = defaultdict(list)
    for head, offset in enumerate(offsets):
        heads_with[len(range(offset, segment, rate))].append((head, head // group, offset))
    heads_with.pop(0, None)
    runs = []
    for left in heads_with.values():
        while left:
            candidates = [_progression(left, other) for other in left[1:]] or [left[:1]]
            best = max(candidates, key=len)
            steps = (b - a for a, b in zip(*best[:2], strict=True)) if len(best) > 1 else (0, 0, 0)
            runs.append(Progression(*best[0], *steps, len(best)))
            left = [head for head in left if head not in best]
    return tuple(runs)


def _progression(heads, second):
    """The longest progression among `heads` that begins with the first of them and `second`."""
    first, members = heads[0], set(heads)
    steps = [b - a for a, b in zip(first, second, strict=True)]
    if steps[2] < 0:  # a strided view cannot step backwards
        return [first]
    found, following = [], first
    while following in members:
        found.append(following)
        following = tuple(a + step for a, step in zip(following, steps, strict=True))
    return found
