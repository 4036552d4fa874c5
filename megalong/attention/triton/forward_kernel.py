"""The forward kernel: one tile of queries of one head in one segment of one branch.

Shape suffixes: m queries of the tile, n keys of the tile, d head_dim (padded to BLOCK_D).
"""

import triton
import triton.language as tl

from megalong.attention.triton.geometry import (
    LN2,
    LOG2E,
    NEG_INF,
    VARYING,
    band_ends,
    band_keys,
    compact_rows,
    compact_start,
    load_rows,
    locate,
    narrowed,
    rows_of,
    seen_keys,
    store_rows,
    within_ranges,
)


@triton.jit
def attend(
    largest_m, total_m, acc_md, q_md, k_ptr, v_ptr, k_step, v_step, first_m, last_m, start, stop,
    gap_start, gap_stop, scale2,
    EDGE: tl.constexpr, BOUNDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax of a tile of queries goes on over the key rows [start, stop).

    Per query: the largest score so far (in base 2), the sum of exp2(score - largest) and the sum of
    exp2(score - largest) * v; -inf, 0 and 0 before the first key. EDGE: a query sees the key rows
    up to its last one, at least the first of them; otherwise there are whole tiles of rows, and
    every query sees all. So the largest score is finite from the first tile on. BOUNDED: at an
    edge a query sees the key rows from its first to its last one, which may be none of a tile; and
    those of the gap are left out.
    """
    ACC: tl.constexpr = acc_md.dtype
    gap = (gap_stop - gap_start) if EDGE and BOUNDED else 0
    for before in tl.range(start, stop - gap, BLOCK_N):
        n0 = tl.where(before < gap_start, before, before + gap) if EDGE and BOUNDED else before
        t_n = n0 + tl.arange(0, BLOCK_N)
        valid_n = (t_n < stop) if EDGE else None
        k_nd = load_rows(k_ptr, k_step, t_n, valid_n, HEAD_DIM, BLOCK_D)
        s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision=PRECISION, out_dtype=ACC)
        if EDGE:
            s_mn = tl.where(t_n[None, :] <= last_m[:, None], s_mn, NEG_INF)
        if EDGE and BOUNDED:
            s_mn = tl.where(t_n[None, :] >= first_m[:, None], s_mn, NEG_INF)
        new_m = tl.maximum(largest_m, tl.max(s_mn, 1) * scale2)
        finite_m = tl.where(new_m == NEG_INF, 0.0, new_m) if EDGE and BOUNDED else new_m
        p_mn = tl.exp2(s_mn * scale2 - finite_m[:, None])
        shrink_m = tl.exp2(largest_m - finite_m)
        total_m = total_m * shrink_m + tl.sum(p_mn, 1)
        v_nd = load_rows(v_ptr, v_step, t_n, valid_n, HEAD_DIM, BLOCK_D)
        acc_md = tl.dot(
            p_mn.to(v_nd.dtype), v_nd, acc_md * shrink_m[:, None],
            input_precision=PRECISION, out_dtype=ACC,
        )  # fmt: skip
        largest_m = new_m
    return largest_m, total_m, acc_md


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head,
    tile_ptr, branch_ptr, offset_ptr, band_ptr, start_ptr, stop_ptr,
    tiles, branches, heads, kv_heads, queries, keys, partial_rows, range_heads, scale,
    MERGE: tl.constexpr, ATTENDS: tl.constexpr, GATHERED: tl.constexpr, BANDED: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: batch * kv_heads * tiles * (heads / kv_heads), the heads of a group next to each other.

    Not MERGE: the tile's softmax goes to partial (batch, heads, partial_rows, head_dim) and
    partial_lse (batch, heads, partial_rows), in base 2: compactly, for a later merge.
    MERGE: the tile is merged with the partials of all sparse branches (LongNet eq. 9-12) and goes
    to out (batch, queries, heads, head_dim) and lse (batch, heads, queries), natural.

    q, k, v, out: last stride 1, other strides given. ATTENDS: False where the base offers no keys.
    SPLIT: tiles that need no mask have a loop of their own.
    GATHERED: keys are not the rows of the queries, but `keys` neighbouring rows for all heads.
    BANDED: of these a query sees the range that band says (GATHERED only).
    start_ptr, stop_ptr (batch, range_heads, queries): a query sees the keys from its start, and
    before its stop, which are places in the sequence, or key rows where GATHERED. None: all.
    """
    RANGED: tl.constexpr = start_ptr is not None or stop_ptr is not None
    BOUNDED: tl.constexpr = BANDED or RANGED
    pid = tl.program_id(0)
    group = heads // kv_heads
    line = pid // group % tiles
    batch_kv_head = pid // group // tiles
    kv_head = batch_kv_head % kv_heads
    batch = (batch_kv_head // kv_heads).to(tl.int64)
    head = kv_head * group + pid % group

    branch, tile, start, length, rate = locate(tile_ptr, branch_ptr, line, queries)
    offset = tl.load(offset_ptr + branch * heads + head)
    rows = rows_of(length, offset, rate)
    t_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = t_m < rows
    first = start + offset

    largest_m = tl.full([BLOCK_M], NEG_INF, ACC)
    total_m = tl.zeros([BLOCK_M], ACC)
    acc_md = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if ATTENDS:
        q_md = load_rows(
            q_ptr + batch * q_batch + head.to(tl.int64) * q_head + first * q_row,
            q_row * rate.to(tl.int64), t_m, valid_m, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        if GATHERED:
            key_rows = keys
            first_key = tl.zeros_like(first)
            key_rate = tl.full([], 1, tl.int64)
        else:
            key_rows = rows
            first_key = first
            key_rate = rate.to(tl.int64)
        k_ptr += batch * k_batch + kv_head.to(tl.int64) * k_head + first_key * k_row
        v_ptr += batch * v_batch + kv_head.to(tl.int64) * v_head + first_key * v_row
        if BANDED:
            begin, first_whole, whole, stop = band_keys(
                tile, rows, keys, band_ptr, BLOCK_M, BLOCK_N
            )
            first_m, stop_m = band_ends(t_m, keys, band_ptr)
            last_m = stop_m - 1
        else:
            last_m, whole, stop = seen_keys(tile, t_m, rows, key_rows, CAUSAL, BLOCK_M, BLOCK_N)
            first_m = tl.zeros_like(last_m)
            begin = tl.zeros_like(whole)
            first_whole = begin
        if RANGED:
            ranges = (batch * range_heads + head % range_heads) * queries
            begin, first_whole, whole, stop = narrowed(
                begin, first_whole, whole, stop, tile, rows, start_ptr, stop_ptr, ranges, first,
                rate, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            first_m, last_m = within_ranges(
                first_m, last_m, t_m, valid_m, start_ptr, stop_ptr, ranges, first, rate
            )
        k_row *= key_rate
        v_row *= key_rate
        if SPLIT:
            largest_m, total_m, acc_md = attend(
                largest_m, total_m, acc_md, q_md, k_ptr, v_ptr, k_row, v_row, first_m, last_m,
                first_whole, whole, 0, 0, scale * LOG2E,
                False, BOUNDED, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        else:
            whole = first_whole
        if not BOUNDED:
            begin = whole
        largest_m, total_m, acc_md = attend(
            largest_m, total_m, acc_md, q_md, k_ptr, v_ptr, k_row, v_row, first_m, last_m,
            begin, stop, first_whole, whole, scale * LOG2E,
            True, BOUNDED, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip

    batch_head = batch * heads + head
    partial_ptr += batch_head * partial_rows * HEAD_DIM
    partial_lse_ptr += batch_head * partial_rows
    if MERGE:
        position_m = first.to(tl.int32) + t_m
        for sparse in tl.range(0, branches - 1):
            covered_m, row_m = compact_rows(
                position_m, valid_m, branch_ptr, sparse,
                tl.load(offset_ptr + sparse * heads + head),
            )  # fmt: skip
            lse_m = tl.load(partial_lse_ptr + row_m, mask=covered_m, other=NEG_INF)
            out_md = load_rows(partial_ptr, HEAD_DIM, row_m, covered_m, HEAD_DIM, BLOCK_D)
            new_m = tl.maximum(largest_m, lse_m)
            finite_m = tl.where(new_m == NEG_INF, 0.0, new_m)
            shrink_m = tl.exp2(largest_m - finite_m)
            weight_m = tl.exp2(lse_m - finite_m)
            acc_md = acc_md * shrink_m[:, None] + out_md.to(ACC) * weight_m[:, None]
            total_m = total_m * shrink_m + weight_m
            largest_m = new_m

    empty_m = total_m == 0.0
    safe_m = tl.where(empty_m, 1.0, total_m)
    acc_md = acc_md / safe_m[:, None]
    lse_m = largest_m + tl.log2(safe_m)  # -inf where empty
    out_ptr += batch * out_batch + head.to(tl.int64) * out_head + first * out_row
    if MERGE:
        store_rows(out_ptr, out_row, t_m, valid_m, acc_md, HEAD_DIM, BLOCK_D)
        tl.store(lse_ptr + batch_head * queries + first + t_m, lse_m * LN2, mask=valid_m)
    else:
        row_m = compact_start(tile_ptr, branch_ptr, line) + t_m
        store_rows(partial_ptr, HEAD_DIM, row_m, valid_m, acc_md, HEAD_DIM, BLOCK_D)
        tl.store(partial_lse_ptr + row_m, lse_m, mask=valid_m)
