"""The backward kernels: delta, the gradient of q, and those of k and v.

With the MERGED log-sum-exp of the forward pass every branch gives its share of the gradient of
the one softmax over all branches' keys, P = exp(s - lse) and dS = P * (dP - delta), and the shares
only add. Every row of a result has one program that owns it, so nothing is added atomically and
repeats are equal bit for bit: the sparse branches write compact shares in float32, and the program
of a base tile adds them to its own.

Shape suffixes: m queries of the tile, n keys of the tile, d head_dim (padded to BLOCK_D).
"""

import triton
import triton.language as tl

from megalong.attention.triton.geometry import (
    LOG2E,
    VARYING,
    band_ends,
    band_keys,
    band_queries,
    compact_rows,
    compact_start,
    load_rows,
    locate,
    narrowed,
    range_ends,
    rows_of,
    seeing_queries,
    seen_keys,
    store_rows,
    within_ranges,
)


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr,
    out_batch, out_row, out_head, grad_batch, grad_row, grad_head,
    tiles, heads, queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta (batch, heads, queries) = rowsum(dO * O). Grid: batch * heads * tiles of queries."""
    pid = tl.program_id(0)
    batch_head = (pid // tiles).to(tl.int64)
    batch = batch_head // heads
    head = batch_head % heads
    row_m = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = row_m < queries
    out_ptr += batch * out_batch + head * out_head
    grad_ptr += batch * grad_batch + head * grad_head
    out_md = load_rows(out_ptr, out_row, row_m, valid_m, HEAD_DIM, BLOCK_D)
    grad_md = load_rows(grad_ptr, grad_row, row_m, valid_m, HEAD_DIM, BLOCK_D)
    delta_m = tl.sum(out_md.to(ACC) * grad_md.to(ACC), 1)
    tl.store(delta_ptr + batch_head * queries + row_m, delta_m, mask=valid_m)


@triton.jit
def add_keys(
    dq_md, q_md, grad_md, lse_m, delta_m, k_ptr, v_ptr, k_step, v_step, first_m, last_m, start,
    stop, gap_start, gap_stop, scale2,
    EDGE: tl.constexpr, BOUNDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq plus the share of the key rows [start, stop). EDGE: a query sees those up to its last one;
    otherwise there are whole tiles of rows, and every query sees all. BOUNDED: as in the forward
    kernel. lse_m: in base 2."""
    ACC: tl.constexpr = dq_md.dtype
    gap = (gap_stop - gap_start) if EDGE and BOUNDED else 0
    for before in tl.range(start, stop - gap, BLOCK_N):
        n0 = tl.where(before < gap_start, before, before + gap) if EDGE and BOUNDED else before
        t_n = n0 + tl.arange(0, BLOCK_N)
        valid_n = (t_n < stop) if EDGE else None
        k_nd = load_rows(k_ptr, k_step, t_n, valid_n, HEAD_DIM, BLOCK_D)
        v_nd = load_rows(v_ptr, v_step, t_n, valid_n, HEAD_DIM, BLOCK_D)
        s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision=PRECISION, out_dtype=ACC)
        p_mn = tl.exp2(s_mn * scale2 - lse_m[:, None])
        if EDGE:
            p_mn = tl.where(t_n[None, :] <= last_m[:, None], p_mn, 0.0)
        if EDGE and BOUNDED:
            p_mn = tl.where(t_n[None, :] >= first_m[:, None], p_mn, 0.0)
        dp_mn = tl.dot(grad_md, tl.trans(v_nd), input_precision=PRECISION, out_dtype=ACC)
        ds_mn = p_mn * (dp_mn - delta_m[:, None])
        dq_md = tl.dot(ds_mn.to(k_nd.dtype), k_nd, dq_md, input_precision=PRECISION, out_dtype=ACC)
    return dq_md


@triton.jit(do_not_specialize=VARYING)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, partial_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dq_batch, dq_row, dq_head,
    tile_ptr, branch_ptr, offset_ptr, band_ptr, start_ptr, stop_ptr,
    tiles, branches, heads, kv_heads, queries, keys, partial_rows, range_heads, scale,
    MERGE: tl.constexpr, ATTENDS: tl.constexpr, GATHERED: tl.constexpr, BANDED: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries: dq = scale * sum over keys of dS k. Grid as in the forward kernel.

    Not MERGE: the share of a sparse branch goes to partial (batch, heads, partial_rows, head_dim).
    MERGE: the tile of the base adds these shares and writes dq (batch, queries, heads, head_dim).
    lse, delta: (batch, heads, queries), lse natural. ATTENDS, GATHERED, BANDED, start_ptr and
    stop_ptr: as in the forward kernel.
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
    batch_head = batch * heads + head

    branch, tile, start, length, rate = locate(tile_ptr, branch_ptr, line, queries)
    offset = tl.load(offset_ptr + branch * heads + head)
    rows = rows_of(length, offset, rate)
    t_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_m = t_m < rows
    first = start + offset
    rate = rate.to(tl.int64)

    dq_md = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    if ATTENDS:
        q_ptr += batch * q_batch + head.to(tl.int64) * q_head + first * q_row
        grad_ptr += batch * grad_batch + head.to(tl.int64) * grad_head + first * grad_row
        q_md = load_rows(q_ptr, q_row * rate, t_m, valid_m, HEAD_DIM, BLOCK_D)
        grad_md = load_rows(grad_ptr, grad_row * rate, t_m, valid_m, HEAD_DIM, BLOCK_D)
        position_m = first + t_m * rate
        lse_m = tl.load(lse_ptr + batch_head * queries + position_m, mask=valid_m, other=0.0)
        lse_m = lse_m * LOG2E
        delta_m = tl.load(delta_ptr + batch_head * queries + position_m, mask=valid_m, other=0.0)
        if GATHERED:
            key_rows = keys
            first_key = tl.zeros_like(first)
            key_rate = tl.full([], 1, tl.int64)
        else:
            key_rows = rows
            first_key = first
            key_rate = rate
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
        k_ptr += batch * k_batch + kv_head.to(tl.int64) * k_head + first_key * k_row
        v_ptr += batch * v_batch + kv_head.to(tl.int64) * v_head + first_key * v_row
        k_row *= key_rate
        v_row *= key_rate
        if not SPLIT:
            whole = first_whole
        if not BOUNDED:
            begin = whole
        dq_md = add_keys(
            dq_md, q_md, grad_md, lse_m, delta_m, k_ptr, v_ptr, k_row, v_row, first_m, last_m,
            begin, stop, first_whole, whole, scale * LOG2E,
            True, BOUNDED, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
        if SPLIT:
            dq_md = add_keys(
                dq_md, q_md, grad_md, lse_m, delta_m, k_ptr, v_ptr, k_row, v_row, first_m, last_m,
                first_whole, whole, 0, 0, scale * LOG2E,
                False, BOUNDED, HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        dq_md = dq_md * scale

    partial_ptr += batch_head * partial_rows * HEAD_DIM
    if MERGE:
        place_m = first.to(tl.int32) + t_m  # not position_m: it would take registers until here
        for sparse in tl.range(0, branches - 1):
            covered_m, row_m = compact_rows(
                place_m, valid_m, branch_ptr, sparse,
                tl.load(offset_ptr + sparse * heads + head),
            )  # fmt: skip
            dq_md += load_rows(partial_ptr, HEAD_DIM, row_m, covered_m, HEAD_DIM, BLOCK_D)
        dq_ptr += batch * dq_batch + head.to(tl.int64) * dq_head + first * dq_row
        store_rows(dq_ptr, dq_row, t_m, valid_m, dq_md, HEAD_DIM, BLOCK_D)
    else:
        row_m = compact_start(tile_ptr, branch_ptr, line) + t_m
        store_rows(partial_ptr, HEAD_DIM, row_m, valid_m, dq_md, HEAD_DIM, BLOCK_D)


@triton.jit
def add_class_shares(
    x_nd, partial_ptr, class_ptr, position_n, valid_n, branch_ptr,
    sparse_branches, kv_heads, slots, partial_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x plus what the sparse branches found for the same keys, each in the slot of its offset.

    partial_ptr and class_ptr are those of the program's batch row and kv head.
    """
    for number in tl.range(0, sparse_branches * slots):
        sparse = number // slots
        slot = number % slots
        offset = tl.load(class_ptr + sparse * kv_heads * slots + slot)
        covered_n, row_n = compact_rows(position_n, valid_n, branch_ptr, sparse, offset)
        row_n += slot.to(tl.int64) * partial_rows
        x_nd += load_rows(partial_ptr, HEAD_DIM, row_n, covered_n, HEAD_DIM, BLOCK_D)
    return x_nd


@triton.jit
def add_queries(
    dk_nd, dv_nd, k_nd, v_nd, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_step, grad_step, rate,
    t_n, start_n, stop_n, begin, stop, gap_start, gap_stop, keys, band_ptr, scale2,
    EDGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr, BANDED: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv plus the shares of the query rows [begin, stop) but those in the gap.

    EDGE: a key row is seen by the query rows from its own on, if CAUSAL, or by those in whose band
    it is, if BANDED; and by those from its start_n on and before its stop_n, where these are not
    None. Otherwise there are whole tiles of query rows, all of which see all keys. A query beyond
    the last one has lse inf, and exp2(s - inf) = 0. The few tiles at edges are not pipelined: that
    would cost the main loop registers.
    """
    ACC: tl.constexpr = dk_nd.dtype
    gap = gap_stop - gap_start
    for before in tl.range(begin, stop - gap, BLOCK_M, num_stages=1 if EDGE and SPLIT else None):
        m0 = tl.where(before < gap_start, before, before + gap) if EDGE else before
        t_m = m0 + tl.arange(0, BLOCK_M)
        valid_m = (t_m < stop) if EDGE else None
        q_md = load_rows(q_ptr, q_step, t_m, valid_m, HEAD_DIM, BLOCK_D)
        if EDGE:
            lse_m = tl.load(lse_ptr + t_m * rate, mask=valid_m, other=float("inf"))
        else:
            lse_m = tl.load(lse_ptr + t_m * rate)
        s_nm = tl.dot(k_nd, tl.trans(q_md), input_precision=PRECISION, out_dtype=ACC)
        p_nm = tl.exp2(s_nm * scale2 - (lse_m * LOG2E)[None, :])
        if EDGE and CAUSAL:
            p_nm = tl.where(t_n[:, None] <= t_m[None, :], p_nm, 0.0)
        if EDGE and BANDED:
            start_m, stop_m = band_ends(t_m, keys, band_ptr)
            seen_nm = (t_n[:, None] >= start_m[None, :]) & (t_n[:, None] < stop_m[None, :])
            p_nm = tl.where(seen_nm, p_nm, 0.0)
        if EDGE and start_n is not None:
            p_nm = tl.where(t_m[None, :] >= start_n[:, None], p_nm, 0.0)
        if EDGE and stop_n is not None:
            p_nm = tl.where(t_m[None, :] < stop_n[:, None], p_nm, 0.0)
        grad_md = load_rows(grad_ptr, grad_step, t_m, valid_m, HEAD_DIM, BLOCK_D)
        dv_nd = tl.dot(
            p_nm.to(grad_md.dtype), grad_md, dv_nd, input_precision=PRECISION, out_dtype=ACC
        )
        if EDGE:
            delta_m = tl.load(delta_ptr + t_m * rate, mask=valid_m, other=0.0)
        else:
            delta_m = tl.load(delta_ptr + t_m * rate)
        dp_nm = tl.dot(v_nd, tl.trans(grad_md), input_precision=PRECISION, out_dtype=ACC)
        ds_nm = p_nm * (dp_nm - delta_m[None, :])
        dk_nd = tl.dot(ds_nm.to(q_md.dtype), q_md, dk_nd, input_precision=PRECISION, out_dtype=ACC)
    return dk_nd, dv_nd


@triton.jit(do_not_specialize=VARYING)
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    partial_dk_ptr, partial_dv_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head, dk_batch, dk_row, dk_head, dv_batch, dv_row, dv_head,
    tile_ptr, branch_ptr, offset_ptr, class_ptr, band_ptr, start_ptr, stop_ptr,
    tiles, branches, heads, kv_heads, slots, queries, keys, partial_rows, range_heads, scale,
    MERGE: tl.constexpr, ATTENDS: tl.constexpr, GATHERED: tl.constexpr, BANDED: tl.constexpr,
    SPLIT: tl.constexpr, CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: dv = sum over queries of P dO, dk = scale * sum over queries of dS q.

    Grid: batch * kv_heads * tiles * slots (MERGE: * 1). A slot is one of the offsets that the
    query heads of a kv head have in a branch: the heads with this offset read the program's rows
    and are summed here. With the "mod" and "layer" rules there is one slot.

    Not MERGE: the shares of a sparse branch go to partial_dk and partial_dv (batch, kv_heads,
    slots, partial_rows, head_dim). MERGE: the tile of the base adds these shares and writes dk and
    dv (batch, keys, kv_heads, head_dim). lse, delta: as in dq_kernel. GATHERED: the table's
    rows are the gathered keys, and the queries are `queries` neighbouring rows.
    start_ptr, stop_ptr (batch, range_heads, keys): a key is seen by the queries from its start on,
    and before its stop, which are places in the sequence, or query rows where GATHERED. None: all.
    """
    RANGED: tl.constexpr = start_ptr is not None or stop_ptr is not None
    pid = tl.program_id(0)
    group = heads // kv_heads
    if MERGE:
        slot = 0
        line = pid % tiles
        batch_kv_head = pid // tiles
    else:
        slot = pid % slots
        line = pid // slots % tiles
        batch_kv_head = pid // slots // tiles
    kv_head = batch_kv_head % kv_heads
    batch = (batch_kv_head // kv_heads).to(tl.int64)

    branch, tile, start, length, rate = locate(tile_ptr, branch_ptr, line, keys)
    offset = tl.load(class_ptr + (branch * kv_heads + kv_head) * slots + slot)
    rows = tl.where(offset < 0, 0, rows_of(length, offset, rate))  # a slot that is not used: none
    t_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = t_n < rows
    first = start + offset
    rate = rate.to(tl.int64)

    dk_nd = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv_nd = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if ATTENDS:
        k_ptr += batch * k_batch + kv_head.to(tl.int64) * k_head + first * k_row
        v_ptr += batch * v_batch + kv_head.to(tl.int64) * v_head + first * v_row
        k_nd = load_rows(k_ptr, k_row * rate, t_n, valid_n, HEAD_DIM, BLOCK_D)
        v_nd = load_rows(v_ptr, v_row * rate, t_n, valid_n, HEAD_DIM, BLOCK_D)
        if GATHERED:
            query_rows = queries
            first_query = tl.zeros_like(first)
            query_rate = tl.full([], 1, tl.int64)
        else:
            query_rows = rows
            first_query = first
            query_rate = rate
        if BANDED:
            begin, first_whole, last_whole, stop = band_queries(
                tile, queries, keys, band_ptr, BLOCK_M, BLOCK_N
            )
        else:
            begin, first_whole, last_whole, stop = seeing_queries(
                tile, rows, query_rows, CAUSAL, BLOCK_M, BLOCK_N
            )
        if not SPLIT:
            last_whole = first_whole
        q_step = q_row * query_rate
        grad_step = grad_row * query_rate

        for member in tl.range(0, group):
            head = kv_head * group + member
            batch_head = batch * heads + head
            query = q_ptr + batch * q_batch + head.to(tl.int64) * q_head + first_query * q_row
            grad = grad_ptr + batch * grad_batch + head.to(tl.int64) * grad_head
            grad += first_query * grad_row
            lse = lse_ptr + batch_head * queries + first_query
            delta = delta_ptr + batch_head * queries + first_query
            reads = tl.load(offset_ptr + branch * heads + head) == offset
            ranges = 0
            start_n = None
            stop_n = None
            if RANGED:
                ranges = (batch * range_heads + head % range_heads) * keys
            if start_ptr is not None:
                start_n = range_ends(start_ptr + ranges, t_n, valid_n, first, rate)
            if stop_ptr is not None:
                stop_n = range_ends(stop_ptr + ranges, t_n, valid_n, first, rate)
            low, low_whole, high_whole, high = narrowed(
                begin, first_whole, last_whole, stop, tile, rows, start_ptr, stop_ptr, ranges,
                first, rate, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            dk_nd, dv_nd = add_queries(
                dk_nd, dv_nd, k_nd, v_nd, query, grad, lse, delta, q_step, grad_step,
                query_rate, t_n, start_n, stop_n, low, tl.where(reads, high, 0), low_whole,
                high_whole, keys, band_ptr, scale * LOG2E,
                True, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, BANDED, SPLIT, PRECISION,
            )  # fmt: skip
            if SPLIT:
                dk_nd, dv_nd = add_queries(
                    dk_nd, dv_nd, k_nd, v_nd, query, grad, lse, delta, q_step, grad_step,
                    query_rate, t_n, None, None, low_whole, tl.where(reads, high_whole, 0), 0, 0,
                    keys, band_ptr, scale * LOG2E,
                    False, HEAD_DIM, BLOCK_D, BLOCK_M, CAUSAL, BANDED, SPLIT, PRECISION,
                )  # fmt: skip
        dk_nd = dk_nd * scale

    if MERGE:
        position_n = first.to(tl.int32) + t_n
        share = (batch * kv_heads + kv_head) * slots * partial_rows * HEAD_DIM
        dv_nd = add_class_shares(
            dv_nd, partial_dv_ptr + share, class_ptr + kv_head * slots, position_n, valid_n,
            branch_ptr, branches - 1, kv_heads, slots, partial_rows,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dv_ptr += batch * dv_batch + kv_head.to(tl.int64) * dv_head + first * dv_row
        store_rows(dv_ptr, dv_row, t_n, valid_n, dv_nd, HEAD_DIM, BLOCK_D)
        dk_nd = add_class_shares(  # only now: both at once would not fit the registers
            dk_nd, partial_dk_ptr + share, class_ptr + kv_head * slots, position_n, valid_n,
            branch_ptr, branches - 1, kv_heads, slots, partial_rows,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        dk_ptr += batch * dk_batch + kv_head.to(tl.int64) * dk_head + first * dk_row
        store_rows(dk_ptr, dk_row, t_n, valid_n, dk_nd, HEAD_DIM, BLOCK_D)
    else:
        share = ((batch * kv_heads + kv_head) * slots + slot) * partial_rows * HEAD_DIM
        row_n = compact_start(tile_ptr, branch_ptr, line) + t_n
        store_rows(partial_dk_ptr + share, HEAD_DIM, row_n, valid_n, dk_nd, HEAD_DIM, BLOCK_D)
        store_rows(partial_dv_ptr + share, HEAD_DIM, row_n, valid_n, dv_nd, HEAD_DIM, BLOCK_D)
