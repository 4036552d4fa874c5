"""What the kernels share: from a line of the tile table to rows in memory.

Names inside the kernels: t counts the rows of one segment as one head sees them (its sparse
index), so causality is t_key <= t_query and positions play no part; `step` is the distance of two
such rows in elements, rate * stride, so strided rows are read in place. Everything that is
multiplied by a stride is int64: tensors may hold more than 2^31 elements.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # softmax runs in base 2: exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))

# Integer arguments that change with the length of a sequence, the documents in it, the pattern and
# the heads. Triton would compile once more for each that turns into 1 or into a multiple of 16.
VARYING = (
    "tiles",
    "branches",
    "heads",
    "kv_heads",
    "slots",
    "queries",
    "partial_rows",
    "delta_rows",
    "gathered_keys",
    "gathered_queries",
    "shift",
)


@triton.jit
def locate(tile_ptr, document_ptr, branch_ptr, branches, line):
    """The segment of a line of the tile table.

    Returns its branch, the tile in it, the address of its document's line, its first position and
    its length in positions, its rate and its first compact row.
    """
    branch = tl.load(tile_ptr + 4 * line)
    document = tl.load(tile_ptr + 4 * line + 1)
    segment = tl.load(tile_ptr + 4 * line + 2)
    tile = tl.load(tile_ptr + 4 * line + 3)
    width = tl.load(branch_ptr + 3 * branch)
    rate = tl.load(branch_ptr + 3 * branch + 1)
    segment_rows = tl.load(branch_ptr + 3 * branch + 2)
    document_line = document_ptr + document.to(tl.int64) * (branches + 2)
    start = tl.load(document_line) + segment * width
    length = tl.minimum(tl.load(document_line + 1) - start, width).to(tl.int32)
    compact = tl.load(document_line + 2 + branch) + segment.to(tl.int64) * segment_rows
    return branch, tile, document_line, start, length, rate, compact


@triton.jit
def rows_of(length, offset, rate):
    """How many of `length` positions are offset, offset + rate, ...; offset < rate."""
    return (length - offset + rate - 1) // rate


@triton.jit
def compact_rows(local, valid, document_line, branch_ptr, branch, offset):
    """Where a sparse branch keeps its results for the positions `local` of a document.

    Returns which of the positions take part in the branch, and their compact rows (int64).
    """
    width = tl.load(branch_ptr + 3 * branch)
    rate = tl.load(branch_ptr + 3 * branch + 1)
    segment_rows = tl.load(branch_ptr + 3 * branch + 2)
    segment = local // width
    inside = local - segment * width
    covered = valid & (inside % rate == offset)
    first = tl.load(document_line + 2 + branch)
    return covered, first + segment.to(tl.int64) * segment_rows + inside // rate


@triton.jit
def row_pointers(ptr, step, rows, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) pointers to rows of neighbouring numbers."""
    return ptr + rows.to(tl.int64)[:, None] * step + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def row_mask(valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which numbers of the valid rows exist, where head_dim is padded."""
    mask = valid[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_rows(ptr, step, rows, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D), zero where invalid or padded."""
    return tl.load(
        row_pointers(ptr, step, rows, BLOCK_D),
        mask=row_mask(valid, HEAD_DIM, BLOCK_D),
        other=0.0,
    )


@triton.jit
def store_rows(ptr, step, rows, valid, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows, in the memory's dtype."""
    tl.store(
        row_pointers(ptr, step, rows, BLOCK_D),
        x.to(ptr.dtype.element_ty),
        mask=row_mask(valid, HEAD_DIM, BLOCK_D),
    )
