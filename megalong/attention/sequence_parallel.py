"""Dilated attention over a sequence that is sharded across ranks: exact, forward and backward.

Every rank holds a contiguous shard. What it attends to within the shard is dilated attention in the
usual sense (`shards.local_attention`) and runs on the usual backend. For the segments that reach
over its borders it gets the sparse keys and values of the other ranks (`sequence_plan`) while the
local attention is computing; its own sparse queries attend to them, to those of earlier ranks in
full and, where attention is causal, to those of later ranks not at all. Where documents are kept
apart, only that of the first one of the shard, or the last, sees anything there; what is exchanged
is the same. All is merged by
log-sum-exp. Backward: with the merged output and log-sum-exp each attention gives its share of the
gradients, and those of remote rows go back to their ranks while the local backward is computing.
Paper: LongNet (arXiv 2307.02486), section 3.1.

Shape suffixes: b batch, s sequence (the shard's), h query heads, g kv heads, d head_dim, m query
rows, n key rows, t sparse rows (see `remote_rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd.function import once_differentiable

from megalong.attention import operators
from megalong.attention.dilated import checked_scale
from megalong.attention.documents import Documents, checked_documents, copied, documents_of
from megalong.attention.exchange import SequenceGroup
from megalong.attention.pattern import DilatedPattern
from megalong.attention.sequence_plan import Plan, make_plan
from megalong.attention.shard_rows import ShardRows, shard_rows
from megalong.attention.shards import LocalAttention, Shards


def sequence_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    sequence: SequenceGroup,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str = "auto",
    document_start: torch.Tensor | None = None,
    document_stop: torch.Tensor | None = None,
    return_lse: bool = False,
):
    """`dilated_attention` of this rank's queries within the whole sequence.

    Called by all ranks of the sequence group, with shards of equal length: rank p holds the
    positions [p l, (p + 1) l). Equals the slice of dilated_attention on the whole sequence, for
    any pattern; nothing is approximated. The bytes that go over the network are in `sequence_plan`.

    q: (batch, shard, heads, head_dim); k, v: (batch, shard, kv_heads, head_dim).
    sequence: the ranks; its subgroups must hold the sizes `sequence_plan.subgroup_sizes`.
    document_start, document_stop: of the shard's positions, with places in the whole sequence.
    The other arguments, the results and the errors are those of dilated_attention; gradients are
    exact. lse is that of the shard's queries, (batch, heads, shard).
    """
    scale = checked_scale(q, k, v, pattern, scale)
    given = documents_of(document_start, document_stop)
    documents = copied(checked_documents(given, q, causal))
    out_bshd, lse_bhs = _SequenceParallelAttention.apply(
        q, k, v, pattern, sequence, documents, bool(causal), scale, backend
    )
    return (out_bshd, lse_bhs) if return_lse else out_bshd


class _SequenceParallelAttention(torch.autograd.Function):
    """Keeps q, k, v, output, log-sum-exp and the remote rows; the backends recompute the rest."""

    @staticmethod
    def forward(ctx, q_bshd, k_bsgd, v_bsgd, pattern, sequence, documents, causal, scale, backend):
        ctx.where = pattern, sequence, documents
        ctx.options = {"causal": causal, "scale": scale, "backend": backend}
        out_bshd, lse_bhs, kept = forward(q_bshd, k_bsgd, v_bsgd, *ctx.where, **ctx.options)
        ctx.save_for_backward(q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, *kept)
        ctx.mark_non_differentiable(lse_bhs)
        return out_bshd, lse_bhs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_bshd, _):
        q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, *kept = ctx.saved_tensors
        gradients = backward(
            grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept, *ctx.where, **ctx.options
        )
        return (*gradients, *[None] * 6)


def forward(
    q_bshd, k_bsgd, v_bsgd, pattern: DilatedPattern, sequence: SequenceGroup,
    documents: Documents | None = None, *, causal: bool, scale: float, backend: str,
    kept: tuple[torch.Tensor, ...] | None = None,
):  # fmt: skip
    """Output like q, log-sum-exp (batch, heads, shard), and the rows that came from other ranks:
    for `backward`, which then needs none. kept: those rows, where they have come before."""
    plan, shard = _plan(q_bshd, k_bsgd, pattern, sequence, causal)
    rows_options = {"scale": scale, "backend": backend}

    def attend(piece: LocalAttention):
        here = [x[:, piece.positions] for x in (q_bshd, k_bsgd, v_bsgd)]
        options = {**rows_options, "documents": _within(documents, plan, piece)}
        out, lse = operators.forward(*here, piece.pattern, causal=causal, **options)
        return out, lse.mT

    with torch.autocast(q_bshd.device.type, enabled=False):
        if kept is None:
            arriving = [exchange.start(sequence, k_bsgd, v_bsgd) for exchange in shard.exchanges]
        else:
            arriving = [(rows, None) for rows in kept]
        out_bshd, lse_bsh = _joined(map(attend, plan.base))
        sums = [shard.queries.take(x, lse_bsh.dtype) for x in (out_bshd, lse_bsh)]
        parts = iter(shard.queries.parts)
        for piece in plan.further:
            part = next(parts)
            part.merge(*sums, *(part.of(x, piece.start) for x in attend(piece)))
        for exchange, (rows, work) in zip(shard.exchanges, arriving, strict=True):
            if work is not None:
                work.wait()
            for attention in exchange.attention:
                new_out_bmhd, new_lse_bhm = operators.attend_rows(
                    attention.queries(q_bshd), *attention.keys(rows),
                    ranges=attention.ranges(documents), **rows_options,
                )  # fmt: skip
                next(parts).merge(*sums, new_out_bmhd, new_lse_bhm.mT)
        for x, x_sums in zip((out_bshd, lse_bsh), sums, strict=True):
            shard.queries.put(x, x_sums)
    return out_bshd, lse_bsh.mT, tuple(rows for rows, _ in arriving)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept, pattern: DilatedPattern,
    sequence: SequenceGroup, documents: Documents | None = None, *, causal: bool, scale: float,
    backend: str,
):  # fmt: skip
    """Gradients (dq, dk, dv) of `forward`, in its inputs' dtype."""
    plan, shard = _plan(q_bshd, k_bsgd, pattern, sequence, causal)
    rows_options = {"scale": scale, "backend": backend}

    def gradients_of(piece: LocalAttention):
        here = [x[:, piece.positions] for x in (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd)]
        lse = lse_bhs[:, :, piece.positions]
        options = {**rows_options, "documents": _within(documents, plan, piece)}
        return operators.backward(*here, lse, piece.pattern, causal=causal, **options)

    with torch.autocast(grad_bshd.device.type, enabled=False):
        returning, query_gradients = [], []
        for exchange, rows in zip(shard.exchanges, kept, strict=True):
            gradients = torch.zeros_like(rows, dtype=lse_bhs.dtype)
            for attention in exchange.attention:
                dq_bmhd, dk_bntd, dv_bntd = operators.attend_rows_backward(
                    attention.queries(grad_bshd), attention.queries(q_bshd),
                    *attention.keys(rows), attention.queries(out_bshd),
                    attention.queries(lse_bhs.mT).mT, ranges=attention.ranges(documents),
                    **rows_options,
                )  # fmt: skip
                attention.put_keys(gradients, dk_bntd, dv_bntd)
                query_gradients.append(dq_bmhd)
            returning.append(exchange.collective.start_back(sequence, gradients))
            del gradients

        gradients = _joined(map(gradients_of, plan.base))
        owners = (shard.queries, shard.keys, shard.keys)
        dq_sums, dk_sums, dv_sums = sums = [
            rows.take(x, lse_bhs.dtype) for rows, x in zip(owners, gradients, strict=True)
        ]
        query_parts, key_parts = iter(shard.queries.parts), iter(shard.keys.parts)
        for piece in plan.further:
            query_part, key_part = next(query_parts), next(key_parts)
            found = gradients_of(piece)
            for part, x_sums, x in zip((query_part, key_part, key_part), sums, found, strict=True):
                part.add(x_sums, part.of(x, piece.start))
            del found, x
        for dq_bmhd in query_gradients:
            next(query_parts).add(dq_sums, dq_bmhd)
        for exchange, (rows, work) in zip(shard.exchanges, returning, strict=True):
            work.wait()
            for places in exchange.leaving.distinct:
                part = next(key_parts)
                for x_sums, new_nbd in zip((dk_sums, dv_sums), rows[places].unbind(1), strict=True):
                    part.add(x_sums, new_nbd.transpose(0, 1))
        for rows, x, x_sums in zip(owners, gradients, sums, strict=True):
            rows.put(x, x_sums)
    return tuple(gradients)


def _within(documents: Documents | None, plan: Plan, piece: LocalAttention) -> Documents | None:
    """The documents of a piece of the shard, with places in it."""
    return documents and documents.within(piece.positions, plan.shards.start + piece.start)


def _plan(q_bshd, k_bsgd, pattern, sequence, causal) -> tuple[Plan, ShardRows]:
    heads, kv_heads = q_bshd.shape[2], k_bsgd.shape[2]
    shards = Shards(sequence.rank, sequence.size, q_bshd.shape[1])
    plan = make_plan(pattern, shards, heads, kv_heads, causal)
    return plan, shard_rows(plan, heads, kv_heads, q_bshd.device)


def _joined(results: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors (batch, s, ...) of consecutive pieces of the shard, one after the other."""
    parts = [list(result) for result in results]
    if len(parts) == 1:
        return parts[0]
    return [torch.cat([part.pop(0) for part in parts], dim=1) for _ in range(len(parts[0]))]
