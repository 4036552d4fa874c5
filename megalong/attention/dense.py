"""Dense attention, on a whole sequence and on a sharded one.

On the sequence axis the keys and values of all shards go round in a ring: each rank attends to one
shard while it passes it on, and gets the next. So a rank holds two shards of keys at a time,
however many ranks there are. Under a causal mask contiguous shards are unequal work, half of it
none; so every rank swaps the second half of its shard with its mirror, the one that is as far from
the other end. Of 2 ranks half shards, numbered by position, each then has one, a, and its
counterpart 2 ranks - 1 - a, and in each step of the ring just as many visible pairs as every other
rank.

A rank sends, of a shard of l positions, in rows of one head (head_dim numbers):

    forward     the swap of (heads + 2 kv_heads) l / 2 rows, and back heads l / 2 of the output and
                its log-sum-exps; (ranks - 1) 2 kv_heads l around the ring
    backward    the swap of (3 heads + 2 kv_heads) l / 2, with log-sum-exps, and back in float32
                (heads + 2 kv_heads) l / 2; (ranks - 1) 2 kv_heads l around the ring, and their
                gradients, in float32, ranks 2 kv_heads l

and nothing for the swap without a causal mask, or where it is its own mirror. Where documents are
kept apart, the l / 2 integers of each sequence are swapped too that say where those of the queries
begin: 2 l bytes once for a batch, not in each layer, 1 / (heads + 2 kv_heads) / head_dim of the
float32 numbers that one layer swaps forward. They stay on the sequence axis because a batch holds
the bounds of its own shard only, which all other kinds need: for the mirror's, every loader, stage
and layer would have to carry one more tensor that dense attention alone reads.

Shape suffixes: b batch, s sequence (the shard's, where it is sharded), h query heads, g kv heads,
d head_dim, n positions, of which a tensor that travels has them in front.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megalong.attention import operators
from megalong.attention.documents import Documents, RowRanges, checked_documents
from megalong.attention.exchange import AllToAll, SequenceGroup
from megalong.attention.passes import Passes, merge
from megalong.attention.pattern import DilatedPattern
from megalong.attention.patterns import ALL, Band
from megalong.attention.tensors import kept_with_tensor


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> torch.Tensor:
    """Dense attention in the layout of dilated_attention, by PyTorch's fused kernels.

    q: (batch, sequence, heads, head_dim), any floating dtype; k, v: (batch,
    sequence, kv_heads, head_dim), heads a multiple of kv_heads. scale: None is head_dim ** -0.5.
    Returns (batch, sequence, heads, head_dim). Time is quadratic in the sequence length, memory
    linear: no mask is ever built. Raises ValueError if the heads do not divide.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    out_bhsd = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        is_causal=causal,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return out_bhsd.transpose(1, 2)


@dataclass(frozen=True)
class DensePasses(Passes):
    """Dense attention of some heads, or of all, of a layer (`passes.Passes`). What goes round is
    not kept: another forward pass exchanges it again.

    backend: "auto" is PyTorch's own operators, the fastest for dense attention; where documents are
        kept apart, it is what dilated attention takes.
    """

    @torch.no_grad()
    def forward(self, q_bshd, k_bsgd, v_bsgd, kept: tuple[torch.Tensor, ...] | None = None):
        options = self.options(q_bshd, k_bsgd, v_bsgd)
        documents = checked_documents(self.documents, q_bshd, self.causal)
        if not self.sharded:
            whole = DilatedPattern((max(q_bshd.shape[1], 1),), (1,))
            options |= {"causal": self.causal, "documents": documents}
            return *operators.forward(q_bshd, k_bsgd, v_bsgd, whole, **options), ()
        ring = Ring(self.sequence, q_bshd.shape[1], self.causal)
        q_bshd, k_bsgd, v_bsgd = ring.swap(q_bshd, k_bsgd, v_bsgd)
        dtype = torch.promote_types(q_bshd.dtype, torch.float32)
        out_bshd = q_bshd.new_zeros(q_bshd.shape, dtype=dtype)
        lse_bsh = q_bshd.new_full(q_bshd.shape[:3], -torch.inf, dtype=dtype)
        for owner, keys in ring.shards_of_keys(k_bsgd, v_bsgd):
            part = ring.part(owner)
            new_out, new_lse = operators.attend_rows(
                q_bshd[:, part.queries], *(x[:, part.keys] for x in keys), part.band,
                ranges=ring.ranges(documents, owner), **options,
            )  # fmt: skip
            out, lse = out_bshd[:, part.queries], lse_bsh[:, part.queries]
            merged_out, merged_lse = merge(out, lse, new_out, new_lse.mT)
            out.copy_(merged_out)
            lse.copy_(merged_lse)
        out_bshd, lse_bshd = ring.swap_back(out_bshd.to(q_bshd.dtype), lse_bsh[..., None])
        return out_bshd, lse_bshd[..., 0].mT.contiguous(), ()

    @torch.no_grad()
    def backward(self, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept):
        options, dtype = self.options(q_bshd, k_bsgd, v_bsgd), q_bshd.dtype
        documents = checked_documents(self.documents, q_bshd, self.causal)
        if not self.sharded:
            whole = DilatedPattern((max(q_bshd.shape[1], 1),), (1,))
            tensors = (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs)
            options |= {"causal": self.causal, "documents": documents}
            return operators.backward(*tensors, whole, **options)
        ring = Ring(self.sequence, q_bshd.shape[1], self.causal)
        lse_bshd = lse_bhs.mT[..., None]
        tensors = ring.swap(grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bshd)
        grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bshd = tensors
        dq_bshd = torch.zeros_like(q_bshd, dtype=lse_bhs.dtype)
        gradients = RingGradients(ring, k_bsgd, lse_bhs.dtype)
        for owner, keys in ring.shards_of_keys(k_bsgd, v_bsgd):
            part = ring.part(owner)
            at = part.queries
            dq, *dkv = operators.attend_rows_backward(
                grad_bshd[:, at], q_bshd[:, at], *(x[:, part.keys] for x in keys),
                out_bshd[:, at], lse_bshd[:, at, :, 0].mT, part.band,
                ranges=ring.ranges(documents, owner), **options,
            )  # fmt: skip
            dq_bshd[:, at] += dq
            gradients.add(part.keys, *dkv)
            del dq, dkv
        return tuple(x.to(dtype) for x in ring.swap_back(dq_bshd, *gradients.home()))

    def options(self, q_bshd, k_bsgd, v_bsgd) -> dict:
        options = super().options(q_bshd, k_bsgd, v_bsgd)
        if self.backend == "auto" and self.documents is None:
            options["backend"] = "sdpa"
        return options


class Part(NamedTuple):
    """Queries and keys of a step that see each other."""

    queries: slice
    keys: slice
    band: Band


@dataclass(frozen=True)
class Ring:
    """The ranks of a sequence, each with a shard of `length` positions, and under a causal mask the
    half shards that it has after the swap: first the lower one, then the other."""

    sequence: SequenceGroup
    length: int
    causal: bool

    @property
    def _mirror(self) -> int:
        return self.sequence.size - 1 - self.sequence.rank

    def _is_lower(self, rank: int) -> bool:
        """Whether a rank has at most as many before it as behind it: its first half stays lower."""
        return 2 * rank < self.sequence.size

    def _low(self, rank: int) -> int:
        """How many positions the lower half shard of a rank has."""
        half = self.length // 2
        return half if self._is_lower(rank) else self.length - half

    def _number(self, rank: int) -> int:
        """Which of all half shards the lower one of a rank is."""
        return 2 * rank if self._is_lower(rank) else 2 * (self.sequence.size - rank) - 1

    def swap(self, *tensors_bshd: torch.Tensor) -> list[torch.Tensor]:
        """Exchange the second halves of the shard with those of the mirror. Tensors (batch, s,
        heads, ...) of any dtypes."""
        half, lower = self.length // 2, self._is_lower(self.sequence.rank)
        return self._swapped(tensors_bshd, slice(0, half), slice(half, None), not lower)

    def swap_back(self, *tensors_bshd: torch.Tensor) -> list[torch.Tensor]:
        """The shard in the order of its positions again."""
        low = self._low(self.sequence.rank)
        lower, upper = slice(0, low), slice(low, None)
        stays, goes = (lower, upper) if self._is_lower(self.sequence.rank) else (upper, lower)
        return self._swapped(tensors_bshd, stays, goes, False)

    def _swapped(self, tensors_bshd, stays: slice, goes: slice, in_front: bool):
        """What stays and what has come, that in front or behind."""
        if not self.causal:
            return list(tensors_bshd)
        moving = self.length - self.length // 2
        if self.sequence.rank == self._mirror:  # takes part in the call, and keeps what it has
            stays, goes, moving = slice(0, self.length), slice(self.length, None), 0
        exchange = self._exchange(self._mirror, self._mirror, moving)
        under_way = [
            exchange.start(self.sequence, x[:, goes].transpose(0, 1).contiguous())
            for x in tensors_bshd
        ]
        swapped = []
        for x, (arriving_nbhd, work) in zip(tensors_bshd, under_way, strict=True):
            work.wait()
            parts = [x[:, stays], arriving_nbhd.transpose(0, 1)]
            swapped.append(torch.cat(parts[::-1] if in_front else parts, 1))
        return swapped

    def shards_of_keys(self, k_bsgd, v_bsgd) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        """The keys and values of one rank after the other, this one's first, with its number; the
        next are on their way meanwhile."""
        here = torch.stack((k_bsgd, v_bsgd))[None]
        for step in range(self.sequence.size):
            last = step == self.sequence.size - 1
            arriving, work = (None, None) if last else self.pass_on(here)
            yield (self.sequence.rank - step) % self.sequence.size, here[0].unbind(0)
            if work is not None:
                work.wait()
            here = arriving

    def part(self, owner: int) -> Part:
        """What this rank's queries see of the keys of a rank, as they are after the swap."""
        everything = slice(0, self.length)
        if not self.causal:
            return Part(everything, everything, ALL)
        if owner == self.sequence.rank:
            return Part(everything, everything, Band(after=1))
        if self._number(owner) < self._number(self.sequence.rank):
            return Part(everything, slice(0, self._low(owner)), ALL)
        return Part(slice(self._low(self.sequence.rank), self.length), everything, ALL)

    def ranges(self, documents: Documents | None, owner: int) -> RowRanges | None:
        """What documents leave the queries of a `part` of its keys."""
        return documents and documents.ranges(_rows_before, self, owner)

    def places(self, rank: int) -> list[tuple[int, int]]:
        """The first place in the whole sequence, and the number of places, of each of the half
        shards that a rank has after the swap."""
        mirror, half = self.sequence.size - 1 - rank, self.length // 2
        if not self.causal or rank == mirror:
            return [(rank * self.length, self.length)]
        halves = [(rank * self.length, half), (mirror * self.length + half, self.length - half)]
        return halves if self._is_lower(rank) else halves[::-1]

    def pass_on(self, x: torch.Tensor):
        """Begin to give a tensor to the next rank, and to get one like it from the one before."""
        rank, ranks = self.sequence.rank, self.sequence.size
        exchange = self._exchange((rank + 1) % ranks, (rank - 1) % ranks, len(x))
        return exchange.start(self.sequence, x)

    def _exchange(self, to: int, of: int, rows: int) -> AllToAll:
        ranks = range(self.sequence.size)
        return AllToAll(
            tuple(rows * (rank == to) for rank in ranks),
            tuple(rows * (rank == of) for rank in ranks),
        )


@kept_with_tensor
def _rows_before(bound_bs: torch.Tensor, ring: Ring, owner: int) -> torch.Tensor:
    """`Documents.ranges` asks for it: how many of the keys of a part lie before the bounds of its
    queries."""
    part = ring.part(owner)
    bound_bm, count = _swapped(bound_bs, ring)[:, part.queries], len(range(ring.length)[part.keys])
    rows_bm = sum((bound_bm - first).clamp(0, places) for first, places in ring.places(owner))
    return rows_bm.clamp(max=count)[:, None]


@kept_with_tensor
def _swapped(bound_bs: torch.Tensor, ring: Ring) -> torch.Tensor:
    """Bounds in the order of the queries after the swap: they are swapped too, once for a batch."""
    [bound_bs1] = ring.swap(bound_bs[..., None])
    return bound_bs1[..., 0].clone()


class RingGradients:
    """The gradients of keys and values, which go round behind them and get a share at each rank."""

    def __init__(self, ring: Ring, k_bsgd: torch.Tensor, dtype: torch.dtype):
        self._ring = ring
        self._under_way = k_bsgd.new_zeros((1, 2, *k_bsgd.shape), dtype=dtype), None

    def add(self, at: slice, dk_bngd: torch.Tensor, dv_bngd: torch.Tensor) -> None:
        """This rank's share of those of the shard that is here, of the positions there."""
        sums = self._arrived()
        for x, share in zip(sums[0], (dk_bngd, dv_bngd), strict=True):
            x[:, at] += share
        self._under_way = self._ring.pass_on(sums)

    def home(self) -> tuple[torch.Tensor, ...]:
        """Those of this rank's own keys and values, after the last share."""
        return self._arrived()[0].unbind(0)

    def _arrived(self) -> torch.Tensor:
        arriving, work = self._under_way
        if work is not None:
            work.wait()
        return arriving
