"""From tensors to kernel launches. Their number does not depend on the number of branches.

Forward: two launches (one where no branch is sparse). All sparse branches write partial outputs
and log-sum-exps compactly; the base merges them and writes output and global log-sum-exp.
Backward: five launches (three where no branch is sparse): delta, then for the gradient of q and
for those of k and v one launch over the sparse branches and one over the base, which merges.

Shape suffixes: b batch, s sequence, h query heads, g kv heads, d head_dim.
"""

from __future__ import annotations

import torch
import triton.language as tl

from megalong.attention.strides import dense_rows, empty_rows
from megalong.attention.triton.backward_kernels import delta_kernel, dkdv_kernel, dq_kernel
from megalong.attention.triton.forward_kernel import forward_kernel
from megalong.attention.triton.ranges import (
    NO_RANGES,
    Ranges,
    keys_in_documents,
    queries_in_documents,
)
from megalong.attention.triton.tables import Tables, pattern_tables, tile_table
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


def launch_forward(
    tables: Tables, base: bool, q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, partial_bhrd,
    partial_lse_bhr, *, causal, scale, gathered=False, band=None, ranges: Ranges = NO_RANGES,
):  # fmt: skip
    """One launch of the forward kernel, over the base or over all sparse branches."""
    names = constants("forward", q_bshd, causal)
    tiles = tile_table(tables, base, names["BLOCK_M"], causal)
    (batch, length, heads, _), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    launch(
        forward_kernel, batch * heads * len(tiles), q_bshd.device,
        q_bshd, k_bsgd, v_bsgd, out_bshd, lse_bhs, partial_bhrd, partial_lse_bhr,
        *strides(q_bshd, k_bsgd, v_bsgd, out_bshd),
        tiles, tables.branches, tables.offsets, tables.offsets if band is None else band, *ranges,
        len(tiles), len(tables.shapes), heads, kv_heads, length, k_bsgd.shape[1],
        partial_lse_bhr.shape[2], ranges.heads, scale,
        MERGE=base, ATTENDS=tables.attends or not base, GATHERED=gathered,
        BANDED=band is not None, **names,
    )  # fmt: skip


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


def launch_dq(
    tables: Tables, base: bool, q_bshd, k_bsgd, v_bsgd, grad_bshd, lse_bhs, delta_bhs, dq_bshd,
    partial_bhrd, *, causal, scale, gathered=False, band=None, ranges: Ranges = NO_RANGES,
):  # fmt: skip
    """One launch of the dq kernel, over the base or over all sparse branches."""
    names = constants("dq", q_bshd, causal)
    tiles = tile_table(tables, base, names["BLOCK_M"], causal)
    (batch, length, heads, _), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    launch(
        dq_kernel, batch * heads * len(tiles), q_bshd.device,
        q_bshd, k_bsgd, v_bsgd, grad_bshd, lse_bhs, delta_bhs, dq_bshd, partial_bhrd,
        *strides(q_bshd, k_bsgd, v_bsgd, grad_bshd, dq_bshd),
        tiles, tables.branches, tables.offsets, tables.offsets if band is None else band, *ranges,
        len(tiles), len(tables.shapes), heads, kv_heads, length, k_bsgd.shape[1],
        partial_bhrd.shape[2], ranges.heads, scale,
        MERGE=base, ATTENDS=tables.attends or not base, GATHERED=gathered,
        BANDED=band is not None, **names,
    )  # fmt: skip


def launch_dkdv(
    tables: Tables, base: bool, q_bshd, k_bsgd, v_bsgd, grad_bshd, lse_bhs, delta_bhs,
    dk_bsgd, dv_bsgd, partial_dk, partial_dv, *, causal, scale, gathered=False, band=None,
    ranges: Ranges = NO_RANGES,
):  # fmt: skip
    """One launch of the dkdv kernel, over the base or over all sparse branches."""
    names = constants("dkdv", q_bshd, causal)
    tiles = tile_table(tables, base, names["BLOCK_N"], False)
    (batch, length, heads, _), kv_heads = q_bshd.shape, k_bsgd.shape[2]
    slots = tables.slots
    launch(
        dkdv_kernel, batch * kv_heads * len(tiles) * (1 if base else slots), q_bshd.device,
        q_bshd, k_bsgd, v_bsgd, grad_bshd, lse_bhs, delta_bhs, dk_bsgd, dv_bsgd,
        partial_dk, partial_dv,
        *strides(q_bshd, k_bsgd, v_bsgd, grad_bshd, dk_bsgd, dv_bsgd),
        tiles, tables.branches, tables.offsets, tables.classes,
        tables.offsets if band is None else band, *ranges,
        len(tiles), len(tables.shapes), heads, kv_heads, slots, length, k_bsgd.shape[1],
        partial_dk.shape[3], ranges.heads, scale,
        MERGE=base, ATTENDS=tables.attends or not base, GATHERED=gathered,
        BANDED=band is not None, **names,
    )  # fmt: skip
