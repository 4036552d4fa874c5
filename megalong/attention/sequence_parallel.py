"""Dilated attention over a sequence that is sharded across ranks: exact, forward and backward.

Every rank holds a contiguous shard. What it attends to within the shard is dilated attention in the
usual sense (`shards.local_attention`) and runs on the usual backend. For the segments that reach
over its borders it gets the sparse keys and values of the other ranks (`sequence_plan`) while the
local attention is computing; its own sparse queries attend to them, to those of earlier ranks in
full and, where attention is causal, to those of later ranks not at all. All is merged by
log-sum-exp. Backward: with the merged output and log-sum-exp each attention gives its share of the
gradients, and those of remote rows go back to their ranks while the local backward is computing.
Paper: LongNet (arXiv 2307.02486), section 3.1.

Shape suffixes: b batch, s sequence (the shard's), h query heads, g kv heads, d head_dim, m query
rows, n key rows, t sparse rows (see `remote_rows`).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megalong.attention import operators
from megalong.attention.dilated import checked_scale
from megalong.attention.exchange import SequenceGroup
from megalong.attention.pattern import DilatedPattern
from megalong.attention.remote_rows import merge, remote_rows
from megalong.attention.sequence_plan import Plan, make_plan
from megalong.attention.shards import Shards


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
    return_lse: bool = False,
):
    """`dilated_attention` of this rank's queries within the whole sequence.

    Called by all ranks of the sequence group, with shards of equal length: rank p holds the
    positions [p l, (p + 1) l). Equals the slice of dilated_attention on the whole sequence, for
    any pattern; nothing is approximated. The bytes that go over the network are in `sequence_plan`.

    q: (batch, shard, heads, head_dim); k, v: (batch, shard, kv_heads, head_dim).
    sequence: the ranks; its subgroups must hold the sizes `sequence_plan.subgroup_sizes`.
    The other arguments, the results and the errors are those of dilated_attention; gradients are
    exact. lse is that of the shard's queries, (batch, heads, shard).
    """
    scale = checked_scale(q, k, v, pattern, scale)
    out_bshd, lse_bhs = _SequenceParallelAttention.apply(
        q, k, v, pattern, sequence, bool(causal), scale, backend
    )
    return (out_bshd, lse_bhs) if return_lse else out_bshd


class _SequenceParallelAttention(torch.autograd.Function):
    """Keeps q, k, v, output, log-sum-exp and the remote rows; the backends recompute the rest."""

    @staticmethod
    def forward(ctx, q_bshd, k_bsgd, v_bsgd, pattern, sequence, causal, scale, backend):
        ctx.where = pattern, sequence
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
        return (*gradients, *[None] * 5)


def forward(
    q_bshd, k_bsgd, v_bsgd, pattern: DilatedPattern, sequence: SequenceGroup,
    *, causal: bool, scale: float, backend: str, kept: tuple[torch.Tensor, ...] | None = None,
):  # fmt: skip
    """Output like q, log-sum-exp (batch, heads, shard), and the rows that came from other ranks:
    for `backward`, which then needs none. kept: those rows, where they have come before."""
    plan = _plan(q_bshd, k_bsgd, pattern, sequence, causal)
    remote = remote_rows(plan, q_bshd.device)
    rows_options = {"scale": scale, "backend": backend}
    with torch.autocast(q_bshd.device.type, enabled=False):
        if kept is None:
            arriving = [exchange.start(sequence, k_bsgd, v_bsgd) for exchange in remote]
        else:
            arriving = [(rows, None) for rows in kept]
        out_bshd, lse_bsh = _local_forward(
            plan, q_bshd, k_bsgd, v_bsgd, causal=causal, **rows_options
        )
        for exchange, (rows, work) in zip(remote, arriving, strict=True):
            if work is not None:
                work.wait()
            for attention in exchange.attention:
                new = operators.attend_rows(
                    attention.queries(q_bshd), *attention.keys(rows), **rows_options
                )
                attention.merge(out_bshd, lse_bsh, *new)
    kept = tuple(rows for rows, _ in arriving)
    return out_bshd.to(q_bshd.dtype), lse_bsh.transpose(1, 2), kept


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, kept, pattern: DilatedPattern,
    sequence: SequenceGroup, *, causal: bool, scale: float, backend: str,
):  # fmt: skip
    """Gradients (dq, dk, dv) of `forward`, in its inputs' dtype."""
    plan = _plan(q_bshd, k_bsgd, pattern, sequence, causal)
    remote = remote_rows(plan, q_bshd.device)
    rows_options = {"scale": scale, "backend": backend}
    lse_bsh = lse_bhs.transpose(1, 2)
    with torch.autocast(grad_bshd.device.type, enabled=False):
        returning, query_gradients = [], []
        for exchange, rows in zip(remote, kept, strict=True):
            gradients = torch.zeros_like(rows, dtype=lse_bhs.dtype)
            for attention in exchange.attention:
                dq_bmhd, dk_bntd, dv_bntd = operators.attend_rows_backward(
                    attention.queries(grad_bshd), attention.queries(q_bshd),
                    *attention.keys(rows), attention.queries(out_bshd),
                    attention.queries(lse_bsh).mT, **rows_options,
                )  # fmt: skip
                attention.put_keys(gradients, dk_bntd, dv_bntd)
                query_gradients.append((attention, dq_bmhd))
            returning.append(exchange.collective.start_back(sequence, gradients))

        dq_bshd, dk_bsgd, dv_bsgd = _local_backward(
            plan, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, causal=causal,
            **rows_options,
        )  # fmt: skip
        for attention, dq_bmhd in query_gradients:
            attention.add_queries(dq_bshd, dq_bmhd)
        for exchange, (rows, work) in zip(remote, returning, strict=True):
            work.wait()
            exchange.leaving.add_to(dk_bsgd, dv_bsgd, rows)
    return tuple(x.to(q_bshd.dtype) for x in (dq_bshd, dk_bsgd, dv_bsgd))


def _plan(q_bshd, k_bsgd, pattern, sequence, causal) -> Plan:
    shards = Shards(sequence.rank, sequence.size, q_bshd.shape[1])
    return make_plan(pattern, shards, q_bshd.shape[2], k_bsgd.shape[2], causal)


def _local_forward(plan: Plan, q_bshd, k_bsgd, v_bsgd, **options):
    """Output and log-sum-exp (batch, shard, heads, ...) of the shard's own rows, to be merged into:
    at least float32 where something will be."""
    results = [
        operators.forward(
            *(x[:, piece.start : piece.stop] for x in (q_bshd, k_bsgd, v_bsgd)), piece.pattern,
            **options,
        )
        for piece in plan.local
    ]  # fmt: skip
    dtype = results[0][1].dtype
    if len(results) == 1:
        [(out_bshd, lse_bhs)] = results
        return out_bshd.to(dtype) if plan.exchanges else out_bshd, lse_bhs.mT.contiguous()
    out_bshd = q_bshd.new_zeros(q_bshd.shape, dtype=dtype)
    lse_bsh = q_bshd.new_full(q_bshd.shape[:3], -torch.inf, dtype=dtype)
    for piece, (new_out_bshd, new_lse_bhs) in zip(plan.local, results, strict=True):
        here = slice(piece.start, piece.stop)
        merged = merge(out_bshd[:, here], lse_bsh[:, here], new_out_bshd, new_lse_bhs.mT)
        out_bshd[:, here], lse_bsh[:, here] = merged
    return out_bshd, lse_bsh


def _local_backward(plan: Plan, grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, **options):
    """The gradients of q, k and v that come from the shard's own rows, to be added to: at least
    float32 where something will be."""
    shares = [
        operators.backward(
            *(
                x[:, piece.start : piece.stop]
                for x in (grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd)
            ),
            lse_bhs[:, :, piece.start : piece.stop], piece.pattern, **options,
        )
        for piece in plan.local
    ]  # fmt: skip
    if len(shares) == 1:
        dtype = lse_bhs.dtype if plan.exchanges else q_bshd.dtype
        return [gradient.to(dtype) for gradient in shares[0]]
    totals = [torch.zeros_like(x, dtype=lse_bhs.dtype) for x in (q_bshd, k_bsgd, v_bsgd)]
    for piece, gradients in zip(plan.local, shares, strict=True):
        for total, gradient in zip(totals, gradients, strict=True):
            total[:, piece.start : piece.stop] += gradient
    return totals
