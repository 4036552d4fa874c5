"""From tensors to kernel launches. Their number does not depend on the number of branches.

Forward: two launches (one where no branch is sparse). All sparse branches write partial outputs
and log-sum-exps compactly; the base merges them and writes output and global log-sum-exp.
Backward: five launches (three where no branch is sparse): delta, then for the gradient of q and
for those of k and v one launch over the sparse branches and one over the base, which merges.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton.language as tl

from megalong.attention.pattern import DilatedPattern
from megalong.attention.patterns import Band
from megalong.attention.tensors import PATTERNS, dense_rows, empty_rows
from megalong.attention.triton.backward_kernels import delta_kernel, dkdv_kernel, dq_kernel
from megalong.attention.triton.forward_kernel import forward_kernel
from megalong.attention.triton.tables import (
    NO_RANGES,
    Ranges,
    Tables,
    keys_in_documents,
    keys_in_ranges,
    pattern_tables,
    queries_in_documents,
    queries_in_ranges,
    tile_table,
)
from megalong.attention.triton.tile_sizes import (
    generation_of,
    padded_head_dim,
    sizes_of,
    splits,
)


def launch(kernel, programs: int, device: torch.device, *arguments, **names):
    """Start a kernel on so many programs, if any: every launch of this backend passes here."""
    if programs:
        with torch.cuda.device(device.index if device.type == "cuda" else -1):
            kernel[(programs,)](*arguments, **names, enable_fp_fusion=True)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, log-sum-exps and partial gradients."""
    return torch.promote_types(dtype, torch.float32)


def constants(kernel: str, q_bshd: torch.Tensor, causal: bool) -> dict:
    """The compile-time arguments that every kernel takes, and the launch options."""
    head_dim, dtype = q_bshd.shape[-1], q_bshd.dtype
    generation = generation_of(q_bshd.device)
    chosen = sizes_of(kernel, head_dim, dtype, generation)
    return {
        "CAUSAL": causal,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "SPLIT": splits(head_dim, dtype, generation),
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        # Without effect on 16-bit inputs. Three TensorFloat-32 products are as good as float32.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


def strides(*tensors: torch.Tensor) -> list[int]:
    """All strides but the last, which is 1."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def forward(q_bshd, k_bsgd, v_bsgd, pattern, *, causal, scale, documents=None):
    q_bshd, k_bsgd, v_bsgd = map(dense_rows, (q_bshd, k_bsgd, v_bsgd))
    (batch, length, heads, head_dim), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    out_bshd = empty_rows(q_bshd)
    lse_bhs = q_bshd.new_empty(batch, heads, length, dtype=accumulator(q_bshd.dtype))
    if not q_bshd.numel():
        return out_bshd, lse_bhs
    tables = pattern_tables(pattern, length, heads, kv_heads, q_bshd.device)
    partial_bhrd = q_bshd.new_empty(batch, heads, tables.sparse_rows, head_dim)
    partial_lse_bhr = lse_bhs.new_empty(batch, heads, tables.sparse_rows)
    ranges = keys_in_documents(documents, causal)
    for base in (False, True):
        launch_forward(
            tables, base, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, partial_bhrd,
            partial_lse_bhr, causal=causal, scale=scale, ranges=ranges,
        )  # fmt: skip
    return out_bshd, lse_bhs


def launch_tiles(
    name: str, kernel, tables: Tables, base: bool, tensors, strided, partial_rows: int, *, causal,
    scale, gathered=False, band=None, ranges: Ranges = NO_RANGES,
):  # fmt: skip
    """One launch of a kernel, over the base or over all sparse branches.

    tensors: what it reads and writes, q and k first. strided: those of which it takes the strides.
    """
    q_bshd, k_bsgd = tensors[:2]
    of_keys = name == "dkdv"
    names = constants(name, q_bshd, causal)
    block = names["BLOCK_N" if of_keys else "BLOCK_M"]
    tiles = tile_table(tables, base, block, causal and not of_keys)
    (batch, length, heads, _), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    owners = (kv_heads if base else kv_heads * tables.slots) if of_keys else heads
    launch(
        kernel, batch * owners * len(tiles), q_bshd.device, *tensors, *strides(*strided),
        tiles, tables.branches, tables.offsets, *((tables.classes,) if of_keys else ()),
        tables.offsets if band is None else band, *ranges,
        len(tiles), len(tables.shapes), heads, kv_heads, *((tables.slots,) if of_keys else ()),
        length, k_bsgd.shape[1], partial_rows, ranges.heads, scale,
        MERGE=base, ATTENDS=tables.attends or not base, GATHERED=gathered,
        BANDED=band is not None, **names,
    )  # fmt: skip


def launch_forward(tables, base, q, k, v, out, lse, partial, partial_lse, **options):
    tensors, strided = (q, k, v, out, lse, partial, partial_lse), (q, k, v, out)
    rows = partial_lse.shape[2]
    launch_tiles("forward", forward_kernel, tables, base, tensors, strided, rows, **options)


def backward(
    grad_bshd, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, pattern, *, causal, scale, documents=None
):  # fmt: skip
    grad_bshd, q_bshd, k_bsgd, v_bsgd = map(dense_rows, (grad_bshd, q_bshd, k_bsgd, v_bsgd))
    lse_bhs = lse_bhs.contiguous()
    (batch, length, heads, head_dim), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    dq_bshd, dk_bsgd, dv_bsgd = gradients = [empty_rows(x) for x in (q_bshd, k_bsgd, v_bsgd)]
    if not q_bshd.numel():
        return tuple(gradients)
    tables = pattern_tables(pattern, length, heads, kv_heads, q_bshd.device)
    common = {"causal": causal, "scale": scale}
    delta_bhs = launch_delta(out_bshd, grad_bshd)
    inputs = (q_bshd, k_bsgd, v_bsgd, grad_bshd, lse_bhs, delta_bhs)
    partial_bhrd = lse_bhs.new_empty(batch, heads, tables.sparse_rows, head_dim)
    ranges = keys_in_documents(documents, causal)
    for base in (False, True):
        launch_dq(tables, base, *inputs, dq_bshd, partial_bhrd, ranges=ranges, **common)
    del partial_bhrd  # its memory serves the next two
    shape = (batch, kv_heads, tables.slots, tables.sparse_rows, head_dim)
    partials = lse_bhs.new_empty(shape), lse_bhs.new_empty(shape)
    ranges = queries_in_documents(documents, causal)
    for base in (False, True):
        launch_dkdv(tables, base, *inputs, dk_bsgd, dv_bsgd, *partials, ranges=ranges, **common)
    return dq_bshd, dk_bsgd, dv_bsgd


def launch_delta(out_bshd, grad_bshd):
    """delta (batch, heads, sequence) = rowsum(dO * O), in the accumulator's dtype."""
    batch, length, heads = out_bshd.shape[:3]
    delta_bhs = out_bshd.new_empty(batch, heads, length, dtype=accumulator(out_bshd.dtype))
    names = constants("delta", out_bshd, causal=False)
    tiles = -(-length // names["BLOCK_M"])
    for unused in ("CAUSAL", "SPLIT", "BLOCK_N", "PRECISION"):
        del names[unused]
    launch(
        delta_kernel, batch * heads * tiles, out_bshd.device,
        out_bshd, grad_bshd, delta_bhs, *strides(out_bshd, grad_bshd), tiles, heads, length,
        **names,
    )  # fmt: skip
    return delta_bhs


def launch_dq(tables, base, q, k, v, grad, lse, delta, dq, partial, **options):
    tensors, strided = (q, k, v, grad, lse, delta, dq, partial), (q, k, v, grad, dq)
    launch_tiles("dq", dq_kernel, tables, base, tensors, strided, partial.shape[2], **options)


def launch_dkdv(
    tables, base, q, k, v, grad, lse, delta, dk, dv, partial_dk, partial_dv, **options
):  # fmt: skip
    tensors = (q, k, v, grad, lse, delta, dk, dv, partial_dk, partial_dv)
    strided, rows = (q, k, v, grad, dk, dv), partial_dk.shape[3]
    launch_tiles("dkdv", dkdv_kernel, tables, base, tensors, strided, rows, **options)


def attend_rows(q_bmhd, k_bngd, v_bngd, band: Band, *, scale: float, ranges=None):
    q_bmhd, k_bngd, v_bngd = map(dense_rows, (q_bmhd, k_bngd, v_bngd))
    (batch, queries, heads, head_dim), kv_heads = q_bmhd.shape, k_bngd.shape[2]
    out_bmhd = empty_rows(q_bmhd)
    lse_bhm = q_bmhd.new_empty(batch, heads, queries, dtype=accumulator(q_bmhd.dtype))
    if not q_bmhd.numel() or not k_bngd.numel():
        return out_bmhd.zero_(), lse_bhm.fill_(-torch.inf)
    launch_forward(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True,
        q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm,
        q_bmhd.new_empty(batch, heads, 0, head_dim), lse_bhm.new_empty(batch, heads, 0),
        causal=False, scale=scale, gathered=True, band=band_tensor(band, q_bmhd, k_bngd),
        ranges=keys_in_ranges(ranges),
    )  # fmt: skip
    return out_bmhd, lse_bhm


def attend_rows_backward(
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd, lse_bhm, band: Band, *, scale: float, ranges=None
):  # fmt: skip
    grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd = map(
        dense_rows, (grad_bmhd, q_bmhd, k_bngd, v_bngd, out_bmhd)
    )
    lse_bhm = lse_bhm.contiguous()
    batch, queries, heads, head_dim = q_bmhd.shape
    keys, kv_heads = k_bngd.shape[1:3]
    gradients = [empty_rows(x, lse_bhm.dtype) for x in (q_bmhd, k_bngd, v_bngd)]
    dq_bmhd, dk_bngd, dv_bngd = gradients
    if not q_bmhd.numel() or not k_bngd.numel():
        return tuple(x.zero_() for x in gradients)
    inputs = (q_bmhd, k_bngd, v_bngd, grad_bmhd, lse_bhm, launch_delta(out_bmhd, grad_bmhd))
    options = {"causal": False, "scale": scale, "gathered": True}
    options["band"] = band_tensor(band, q_bmhd, k_bngd)
    launch_dq(
        one_segment(queries, heads, kv_heads, q_bmhd.device), True, *inputs, dq_bmhd,
        lse_bhm.new_empty(batch, heads, 0, head_dim), ranges=keys_in_ranges(ranges), **options,
    )  # fmt: skip
    nothing = lse_bhm.new_empty(batch, kv_heads, 1, 0, head_dim)
    launch_dkdv(
        one_segment(keys, heads, kv_heads, q_bmhd.device), True, *inputs, dk_bngd, dv_bngd,
        nothing, nothing, ranges=queries_in_ranges(ranges, keys), **options,
    )  # fmt: skip
    return dq_bmhd, dk_bngd, dv_bngd


def one_segment(rows: int, heads: int, kv_heads: int, device: torch.device) -> Tables:
    """The tables of rows that are all neighbours and belong together."""
    return pattern_tables(DilatedPattern((rows,), (1,)), rows, heads, kv_heads, device)


def band_tensor(band: Band, q_bmhd, k_bngd) -> torch.Tensor | None:
    """What the kernels read of a band; None where all queries see all keys."""
    if band.sees_all:
        return None
    return _band_tensor(band, q_bmhd.shape[1], k_bngd.shape[1], q_bmhd.device)


@lru_cache(maxsize=PATTERNS)
def _band_tensor(band: Band, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """before, after, first, query_block and key_block, int32: clipped to what makes a difference,
    so that the kernels' arithmetic stays within 32 bits."""
    most_before = (band.first + queries) // band.query_block + 1
    most_after = -(-keys // band.key_block) + 1
    before = most_before if band.before is None else min(band.before, most_before)
    after = most_after if band.after is None else min(band.after, most_after)
    values = (before, after, band.first, band.query_block, band.key_block)
    return torch.tensor(values, dtype=torch.int32).to(device)
