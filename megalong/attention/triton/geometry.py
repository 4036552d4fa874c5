"""What the kernels share: from a line of the tile table to rows in memory.

Names inside the kernels: t counts the rows of one segment as one head sees them (its sparse
index), so causality is t_key <= t_query and positions play no part; `step` is the distance of two
such rows in elements, rate * stride, so strided rows are read in place. Everything that is
multiplied by a stride is int64: tensors may hold more than 2^31 elements.

What a query row sees is a range of key rows, from a first one, which is row 0, to a last one; and a
key row is seen by a range of query rows. Every mask is the ends of such ranges. A tile that lies
wholly inside the ranges of all its rows needs none, so every kernel loops over those apart from the
tiles at the edges. Causality, a band and the ranges of `ranges.Ranges`, which are documents for
instance, each set such ends; a row's range is what they have in common.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # softmax runs in base 2: exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))

# Integer arguments that change with the length of a sequence, the pattern and the heads. Triton
# would compile once more for each that turns into 1 or into a multiple of 16.
VARYING = (
    "tiles",
    "branches",
    "heads",
    "kv_heads",
    "slots",
    "queries",
    "keys",
    "partial_rows",
    "range_heads",
)


@triton.jit
def locate(tile_ptr, branch_ptr, line, positions):
    """The segment of a line of the tile table, in a sequence of so many positions.

    Returns its branch, the tile in it, its first position, its length in positions and its rate.
    """
    branch = tl.load(tile_ptr + 3 * line)
    segment = tl.load(tile_ptr + 3 * line + 1).to(tl.int64)
    tile = tl.load(tile_ptr + 3 * line + 2)
    width = tl.load(branch_ptr + 4 * branch)
    rate = tl.load(branch_ptr + 4 * branch + 1).to(tl.int32)
    start = segment * width
    length = tl.minimum(positions - start, width).to(tl.int32)
    return branch, tile, start, length, rate


@triton.jit
def compact_start(tile_ptr, branch_ptr, line):
    """The first compact row of that segment. Asked for late: loops in between need registers."""
    branch = tl.load(tile_ptr + 3 * line)
    segment = tl.load(tile_ptr + 3 * line + 1)
    return tl.load(branch_ptr + 4 * branch + 3) + segment * tl.load(branch_ptr + 4 * branch + 2)


@triton.jit
def rows_of(length, offset, rate):
    """How many of `length` positions are offset, offset + rate, ...; offset < rate."""
    return (length - offset + rate - 1) // rate


@triton.jit
def seen_keys(
    tile, t_m, rows, key_rows,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the queries of a tile see: the last key row that each sees; where the tiles of key rows
    end that all of them see whole; and where the key rows stop that any of them sees."""
    if CAUSAL:
        last_m = t_m
        all_see = tl.minimum(key_rows, tile * BLOCK_M + 1)
        stop = tl.minimum(key_rows, (tile + 1) * BLOCK_M)
    else:
        last_m = tl.zeros_like(t_m) + key_rows - 1
        all_see = key_rows
        stop = key_rows
    some = tile * BLOCK_M < rows  # a head may have no row in this tile
    return last_m, tl.where(some, all_see // BLOCK_N * BLOCK_N, 0), tl.where(some, stop, 0)


@triton.jit
def seeing_queries(
    tile, rows, query_rows,
    CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which tiles of query rows see the keys of a tile: where they begin and stop, and between
    which ends all rows see all keys, in multiples of BLOCK_M from the beginning."""
    begin = 0
    if CAUSAL:
        begin = tile * BLOCK_N // BLOCK_M * BLOCK_M
    stop = tl.where(tile * BLOCK_N < rows, query_rows, 0)  # a head may have no row in this tile
    first = begin
    if CAUSAL:
        first = tl.cdiv((tile + 1) * BLOCK_N - 1, BLOCK_M) * BLOCK_M
        first = tl.minimum(first, tl.cdiv(tl.maximum(stop, begin), BLOCK_M) * BLOCK_M)
    return begin, first, tl.maximum(stop // BLOCK_M * BLOCK_M, first), stop


@triton.jit
def band_ends(row, keys, band_ptr):
    """The first key row that a query row sees, and the one after the last (`patterns.Band`)."""
    block = (tl.load(band_ptr + 2) + row) // tl.load(band_ptr + 3)
    size = tl.load(band_ptr + 4)
    start = (block - tl.load(band_ptr)) * size
    stop = (block + tl.load(band_ptr + 1)) * size
    return tl.minimum(tl.maximum(start, 0), keys), tl.minimum(tl.maximum(stop, 0), keys)


@triton.jit
def band_keys(tile, rows, keys, band_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`seen_keys` in a band, of a tile of query rows: where the key rows begin and stop that any of
    them sees, and between which ends all of them see whole tiles of keys; all but the stop in
    multiples of BLOCK_N."""
    begin, high = band_ends(tile * BLOCK_M, keys, band_ptr)
    low, stop = band_ends(tl.minimum((tile + 1) * BLOCK_M, rows) - 1, keys, band_ptr)
    first_whole = tl.cdiv(low, BLOCK_N) * BLOCK_N
    last_whole = tl.maximum(high // BLOCK_N * BLOCK_N, first_whole)
    return begin // BLOCK_N * BLOCK_N, first_whole, last_whole, stop


@triton.jit
def band_queries(tile, queries, keys, band_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`seeing_queries` in a band, of a tile of key rows."""
    before = tl.load(band_ptr)
    after = tl.load(band_ptr + 1)
    place = tl.load(band_ptr + 2)
    rows = tl.load(band_ptr + 3)
    size = tl.load(band_ptr + 4)
    first = tile * BLOCK_N // size  # the blocks of the tile's keys
    last = tl.cdiv(tl.minimum((tile + 1) * BLOCK_N, keys), size)
    begin = (first + 1 - after) * rows - place
    stop = tl.minimum(tl.maximum((last + before) * rows - place, 0), queries)
    first_whole = tl.maximum((last - after) * rows - place, 0)
    last_whole = tl.minimum(tl.maximum((first + before + 1) * rows - place, 0), queries)
    begin = tl.minimum(tl.maximum(begin, 0) // BLOCK_M * BLOCK_M, stop)
    first_whole = tl.maximum(tl.cdiv(first_whole, BLOCK_M) * BLOCK_M, begin)
    return begin, first_whole, tl.maximum(last_whole // BLOCK_M * BLOCK_M, first_whole), stop


@triton.jit
def range_ends(ptr, row, valid, first, rate):
    """The end of a row's range, which ptr has as a place in the sequence, as a row of the other
    side in that segment: the first one that is not before the place. 0 where row is not valid."""
    first = first.to(tl.int32)
    rate = rate.to(tl.int32)
    place = tl.load(ptr + first + row * rate, mask=valid, other=0)
    return (tl.maximum(place - first, 0) + rate - 1) // rate


@triton.jit
def narrowed(
    begin, first_whole, whole, stop, tile, rows, start_ptr, stop_ptr, ranges, first, rate,
    BLOCK: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Between which ends the rows of a tile see rows of the other side, and between which they all
    see whole tiles of these: what ranges leave. Ranges grow along the rows, so that those of the
    first and the last row of the tile say it. ranges: where those of the head lie in memory."""
    low = tile * BLOCK
    high = tl.minimum(low + BLOCK, rows) - 1
    some = low < rows
    if start_ptr is not None:
        least = range_ends(start_ptr + ranges, low, some, first, rate)
        most = range_ends(start_ptr + ranges, high, some, first, rate)
        begin = tl.maximum(begin, least // OTHER * OTHER)
        first_whole = tl.maximum(first_whole, tl.cdiv(most, OTHER) * OTHER)
        whole = tl.maximum(whole, first_whole)
    if stop_ptr is not None:
        least = range_ends(stop_ptr + ranges, low, some, first, rate)
        most = range_ends(stop_ptr + ranges, high, some, first, rate)
        whole = tl.maximum(tl.minimum(whole, least // OTHER * OTHER), first_whole)
        stop = tl.minimum(stop, most)
    return begin, first_whole, whole, stop


@triton.jit
def within_ranges(first_m, last_m, t_m, valid_m, start_ptr, stop_ptr, ranges, first, rate):
    """The first and the last key row that each query of a tile sees, with its range."""
    if start_ptr is not None:
        start_m = range_ends(start_ptr + ranges, t_m, valid_m, first, rate)
        first_m = tl.maximum(first_m, start_m)
    if stop_ptr is not None:
        stop_m = range_ends(stop_ptr + ranges, t_m, valid_m, first, rate)
        last_m = tl.minimum(last_m, stop_m - 1)
    return first_m, last_m


@triton.jit
def compact_rows(position, valid, branch_ptr, branch, offset):
    """Where a sparse branch keeps its results for some positions.

    Returns which of the positions take part in the branch, and their compact rows (int64).
    """
    width = tl.load(branch_ptr + 4 * branch).to(tl.int32)
    rate = tl.load(branch_ptr + 4 * branch + 1).to(tl.int32)
    segment_rows = tl.load(branch_ptr + 4 * branch + 2)
    first = tl.load(branch_ptr + 4 * branch + 3)
    segment = position // width
    inside = position - segment * width
    covered = valid & (inside % rate == offset)
    return covered, first + segment * segment_rows + inside // rate


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
    """(rows, BLOCK_D), zero where invalid or padded. valid: None where all rows are."""
    pointers = row_pointers(ptr, step, rows, BLOCK_D)
    if valid is not None:
        x = tl.load(pointers, mask=row_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        x = tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def store_rows(ptr, step, rows, valid, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows, in the memory's dtype."""
    tl.store(
        row_pointers(ptr, step, rows, BLOCK_D),
        x.to(ptr.dtype.element_ty),
        mask=row_mask(valid, HEAD_DIM, BLOCK_D),
    )
