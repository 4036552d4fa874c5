"""A model's attention in plain PyTorch, and its decode cache. Travels in the exported folder.

The attention of a layer has *parts* (`parts_longnet`), which are merged by their log-sum-exp: that
equals one softmax over the keys of all of them (LongNet, arXiv 2307.02486, eq. 9-12). Autograd
gives the gradient.

Shape letters: b batch, s positions, h query heads, k kv heads, d head_dim, f batch and segments,
g streams (kv heads at one offset), e query heads of a stream, n rows of a part, m queries among
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache, CacheLayerMixin

from .positions_longnet import Documents

NEVER = -1e30  # a log-sum-exp of nothing; finite, so that gradients are
TILE_SCORES = 2**20  # scores that are held at once


def attention(q_bshd, k_bskd, v_bskd, parts, start: int = 0, past=None, first_bs=None):
    """Causal attention of the positions from `start` on.

    past: for each part the rows of keys and of values, (b, g, n, d), that a position at `start`
        may see; what an earlier call returned. None where start is 0.
    first: for each position the place of the first one of its document; None: there is one.
    Returns the output, (b, s, h, d), and the rows for the next call.
    """
    results, present = [], []
    for number, part in enumerate(parts):
        *result, rows = part.attend(
            q_bshd, k_bskd, v_bskd, start, None if start == 0 else past[number], first_bs
        )
        results.append(result)
        present.append(rows)
    return _merged(results).to(q_bshd.dtype), present


def _merged(results: Iterable[tuple[torch.Tensor, torch.Tensor]]):
    """One output of several, with their log-sum-exps."""
    out = lse = None
    for new_out, new_lse in results:
        if out is None:
            out, lse = new_out, new_lse
        else:
            total = torch.logaddexp(lse, new_lse)
            out = out * torch.exp(lse - total) + new_out * torch.exp(new_lse - total)
            lse = total
    return out


def bidirectional_attention(
    q_bshd, k_bskd, v_bskd, parts, counts: list[int], documents: Documents | None = None
):
    """The output, (b, s, h, d). counts: how many real tokens each sequence has, the others being
    padding after them, whose output is zero. documents: those that share a sequence."""
    out_bshd = torch.zeros_like(q_bshd)
    for rows, count in sequences_by_length(counts, q_bshd.device):
        q, k, v = (x[rows, :count] for x in (q_bshd, k_bskd, v_bskd))
        bounds = ()
        if documents is not None:
            bounds = [x[rows, :count] for x in (documents.first_bs, documents.stop_bs)]
        out = _merged(x for part in parts for x in part.attend_both_ways(q, k, v, bounds))
        places = rows[:, None], torch.arange(count, device=rows.device)
        out_bshd = out_bshd.index_put(places, out.to(q_bshd.dtype))
    return out_bshd


def probabilities(
    q_bshd, k_bskd, parts, causal: bool, counts: list[int], documents: Documents | None = None
):
    """The weight of each key in each query's softmax, (b, h, s, s) in at least float32: that of all
    parts which have it, zero where one of them is padding. Quadratic, to be looked at; `attention`
    has no such thing."""
    batch, s, heads = q_bshd.shape[:3]
    dtype, device = torch.promote_types(q_bshd.dtype, torch.float32), q_bshd.device
    found = torch.zeros(batch, heads, s, s, dtype=dtype, device=device)
    for rows, count in sequences_by_length(counts, device):
        q_bhsd = q_bshd[rows, :count].transpose(1, 2)
        k_bhsd = k_bskd[rows, :count].transpose(1, 2)
        k_bhsd = k_bhsd.repeat_interleave(heads // k_bhsd.shape[1], 1)
        scores = (q_bhsd @ k_bhsd.mT * q_bshd.shape[-1] ** -0.5).to(dtype)
        times_hss = torch.zeros(heads, count, count, dtype=dtype, device=device)
        for part in parts:
            seen_gss = part.pairs(count, device, causal)
            times_hss += seen_gss.repeat_interleave(heads // len(part.streams), 0)
        if documents is not None:
            times_hss = times_hss * documents.seen(count)[rows, :, :count]
        weights = (scores + times_hss.log().clamp_min(NEVER)).softmax(-1) * (times_hss > 0)
        found[rows, :, :count, :count] = weights
    return found


def sequences_by_length(counts: list[int], device) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the sequences of a batch that have equally many tokens, which are computed together."""
    for count in sorted({*counts} - {0}):
        rows = [row for row, its_count in enumerate(counts) if its_count == count]
        yield torch.tensor(rows, device=device), count


def range_attention(q_bhmd, k_bgnd, v_bgnd, starts_m, stops_m):
    """Attention of queries to the key rows [start, stop) of each, and its log-sum-exp (b, h, m, 1);
    NEVER where there is none. Both ends grow with the query; they are (m,), or (b, h or 1, m). In
    tiles, as `row_attention`."""
    heads, m = q_bhmd.shape[1:3]
    g, n = k_bgnd.shape[1:3]
    width = max(int((stops_m - starts_m).max()), 1)
    rows = min(max(TILE_SCORES // (heads * width), 1), width, m)
    q_bgemd = q_bhmd.unflatten(1, (g, -1))
    ends = [
        x if x.ndim == 1 else x.unflatten(1, (min(g, x.shape[1]), -1)) for x in (starts_m, stops_m)
    ]
    results = []
    for first in range(0, m, rows):
        here = slice(first, first + rows)
        starts, stops = (x[..., here] for x in ends)
        low = min(int(starts[..., 0].min()), n - 1)
        keys = slice(low, max(int(stops[..., -1].max()), low + 1))
        inputs = q_bgemd[:, :, :, here], k_bgnd[:, :, keys], v_bgnd[:, :, keys]
        results.append(_attend(*inputs, (starts - low)[..., None], (stops - low)[..., None]))
    return tuple(torch.cat(x, 3).flatten(1, 2) for x in zip(*results, strict=True))


def row_attention(q_fhmd, k_fgnd, v_fgnd, bounds=(), causal: bool = True, hidden_gn=None):
    """Attention of m rows, and its log-sum-exp (f, h, m, 1), both in at least float32: a tile of
    queries at a time, computed again in the backward pass, so that memory stays linear.

    bounds: the first row that each query sees, or one before its own, and the row after the last;
        (f, h, m) each. causal: the queries are the last rows, and see those up to their own.
    hidden: rows that no query sees.
    """
    m = q_fhmd.shape[2]
    g, n = k_fgnd.shape[1:3]
    budget = max(TILE_SCORES // (q_fhmd.shape[1] * n), 1)
    rows = min(budget, m)
    # split, not slices: its backward puts the parts together once.
    size = max(budget // rows, 1)
    parts = (x.split(size) for x in (q_fhmd.unflatten(1, (g, -1)), k_fgnd, v_fgnd))
    bounds = [x.unflatten(1, (g, -1))[..., None] for x in bounds] + [None] * (2 - len(bounds))
    lines = []
    for number, (q_part, k_part, v_part) in enumerate(zip(*parts, strict=True)):
        part = slice(number * size, (number + 1) * size)
        line, stop = [], n - m
        for q_tile in q_part.split(rows, 3):
            start, stop = stop, stop + q_tile.shape[3]
            keys, here = slice(stop if causal else n), slice(start - (n - m), stop - (n - m))
            ends = (x if x is None else x[part, :, :, here] for x in bounds)
            inputs = q_tile, k_part[:, :, keys], v_part[:, :, keys], *ends
            line.append(_attend(*inputs, causal, hidden_gn))
        lines.append([torch.cat(x, 3) for x in zip(*line, strict=True)])
    return tuple(torch.cat(x).flatten(1, 2) for x in zip(*lines, strict=True))


def _attend(q_fgemd, *more):
    if torch.is_grad_enabled() and q_fgemd.requires_grad:
        return checkpoint(_tile, q_fgemd, *more, use_reentrant=False, preserve_rng_state=False)
    return _tile(q_fgemd, *more)


def _tile(q_fgemd, k_fgnd, v_fgnd, low_fgem1, stop_fgem1, causal=False, hidden_gn=None):
    f, g, e, m, d = q_fgemd.shape
    n = k_fgnd.shape[2]
    scores = q_fgemd.reshape(f, g, e * m, d) @ k_fgnd.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(f, g, e, m, n)
    scores.mul_(d**-0.5)
    if causal:
        later = torch.ones(m, m, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., n - m :].masked_fill_(later, NEVER)
    if hidden_gn is not None:
        scores.masked_fill_(hidden_gn[:, None, None], NEVER)
    rows = torch.arange(n, device=scores.device)
    if low_fgem1 is not None:
        scores.masked_fill_(rows < low_fgem1, NEVER)
    if stop_fgem1 is not None:
        scores.masked_fill_(rows >= stop_fgem1, NEVER)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp_().to(v_fgnd.dtype).reshape(f, g, e * m, n)
    return (weights @ v_fgnd).reshape(f, g, e, m, d).to(lse.dtype), lse


class LongNetCacheLayer(CacheLayerMixin):
    """What later queries of one layer can still attend to.

    keys, values: for each part (b, streams, rows, d): of a branch the rows of each sequence's
        segment under way, at most w / r of them.
    lengths: the real tokens of each sequence so far. columns: those of the input, with padding.
    under_way: where the document of each sequence began that its next token goes on with.
    """

    is_croppable = False  # the rows of earlier segments are gone
    is_sliding = False

    def __init__(self, parts: list):
        super().__init__()
        self.parts = parts
        self.reset()

    def reset(self) -> None:
        self.keys, self.values, self.lengths, self.columns = [], [], [], 0
        self.under_way: list[int] = []
        self.is_initialized = False

    def attend(self, q_bshd, k_bskd, v_bskd, counts: list[int], documents: Documents | None):
        """Attention of new positions, of which each sequence has `counts`, the others being padding
        after them; remembers their keys and values."""
        s = q_bshd.shape[1]
        if not self.is_initialized:
            self._start(k_bskd)
        first_bs = None if documents is None else documents.first_bs
        if s == 1:
            first_b = None if first_bs is None else first_bs[:, 0]
            new = (x[:, 0] for x in (q_bshd, k_bskd, v_bskd))
            out = self._attend_one(*new, counts, first_b)[:, None]
        else:
            out = self._attend_many(q_bshd, k_bskd, v_bskd, counts, first_bs)
        if documents is not None:
            self.under_way = list(documents.following)
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.columns += s
        return out

    def _start(self, k_bskd):
        batch, _, _, d = k_bskd.shape
        empty = [k_bskd.new_empty(batch, len(x.streams), 0, d) for x in self.parts]
        self.keys, self.values, self.lengths = empty, list(empty), [0] * batch
        self.under_way = [0] * batch
        self.is_initialized = True

    def _attend_many(self, q_bshd, k_bskd, v_bskd, counts, first_bs):
        """Sequences that stand at the same place are computed together."""
        out = torch.zeros_like(q_bshd)
        places = {}
        for row, place in enumerate(zip(self.lengths, counts, strict=True)):
            places.setdefault(place, []).append(row)
        for (length, count), rows in places.items():
            if count == 0:
                continue
            rows = torch.tensor(rows, device=q_bshd.device)
            past = [(k[rows], v[rows]) for k, v in zip(self.keys, self.values, strict=True)]
            new = (x[rows, :count] for x in (q_bshd, k_bskd, v_bskd))
            first = None if first_bs is None else first_bs[rows, :count]
            attended, present = attention(*new, self.parts, length, past, first)
            out[rows, :count] = attended
            for number, pair in enumerate(present):
                for kept, new_rows in zip((self.keys, self.values), pair, strict=True):
                    kept[number] = _store(kept[number], rows, new_rows.detach())
        return out

    def _attend_one(self, q_bhd, k_bkd, v_bkd, counts, first_b):
        """One new position of each sequence: one softmax over the rows of all parts."""
        device = q_bhd.device
        lengths = torch.tensor(self.lengths, device=device)
        real = torch.tensor(counts, device=device).bool()
        scores, masks = [], []
        for number, part in enumerate(self.parts):
            takes_bg, row_bg = part.writes(lengths)
            room = max(map(part.room, self.lengths))
            written = (takes_bg & real[:, None]).nonzero(as_tuple=True)
            kv_heads = torch.tensor([kv_head for kv_head, _ in part.streams], device=device)
            for kept, new in ((self.keys, k_bkd), (self.values, v_bkd)):
                kept[number] = _grown(kept[number], room, part.rows)
                kept[number][*written, row_bg[written]] = new[written[0], kv_heads[written[1]]]
            k_bgnd = self.keys[number]
            mask = part.sees(lengths, k_bgnd.shape[2])
            if first_b is not None:
                mask = mask & part.since(first_b, lengths, k_bgnd.shape[2])
            q_bged = q_bhd.unflatten(1, (len(part.streams), -1))
            mask = mask[:, :, None].expand(-1, -1, q_bged.shape[2], -1).flatten(1, 2)
            scores.append((q_bged @ k_bgnd.mT).flatten(1, 2))
            masks.append(mask)
        sizes = [x.shape[2] for x in scores]
        mask = torch.cat(masks, 2)
        scores = torch.cat(scores, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = (scores * q_bhd.shape[-1] ** -0.5).masked_fill(~mask, NEVER)
        # A query in no part gets 0; where there is a key, NEVER is as good as minus infinity.
        weights = scores.softmax(-1).masked_fill(~mask, 0.0).to(v_bkd.dtype)
        out = 0
        for part, v_bgnd in zip(weights.split(sizes, 2), self.values, strict=True):
            out = out + (part.unflatten(1, (v_bgnd.shape[1], -1)) @ v_bgnd).flatten(1, 2)
        return out

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.is_initialized:
            self.keys, self.values = (
                [x.index_select(0, indices.to(x.device)) for x in kept]
                for kept in (self.keys, self.values)
            )
            chosen = indices.tolist()
            self.lengths = [self.lengths[i] for i in chosen]
            self.under_way = [self.under_way[i] for i in chosen]

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.lengths)).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(
                "LongNet's cache cannot go back: it drops what later tokens cannot attend to"
            )

    def rows(self) -> int:
        """Rows of keys that are kept for one sequence and one kv head, over all parts."""
        kv_heads = self.parts[0].kv_heads
        return sum(x.shape[1] * x.shape[2] for x in self.keys) // kv_heads

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def lazy_initialization(self, key_states, value_states) -> None:
        raise NotImplementedError("a LongNet layer fills its cache itself: see attend")

    update = lazy_initialization


def _grown(x_bgnd, rows: int, limit: int):
    """With room for so many rows, and some to spare; never for more than limit."""
    room = x_bgnd.shape[2]
    if rows <= room:
        return x_bgnd
    return F.pad(x_bgnd, (0, 0, 0, min(max(rows, room + room // 8 + 8), limit) - room))


def _store(kept_bgnd, rows, new_bgnd):
    """The new rows of some of the sequences in place of the old ones."""
    if len(rows) == len(kept_bgnd):
        return new_bgnd
    count = new_bgnd.shape[2]
    kept_bgnd = _grown(kept_bgnd, count, count).clone()
    kept_bgnd[rows, :, :count] = new_bgnd
    return kept_bgnd


class LongNetCache(Cache):
    """The cache of all layers: of dilated ones O(sum of w / r) rows each, however long the
    sequence."""

    def __init__(self, parts_of_layers: list[list]):
        super().__init__(layers=[LongNetCacheLayer(parts) for parts in parts_of_layers])

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence so far; empty before the first."""
        return self.layers[0].lengths

    @property
    def under_way(self) -> list[int]:
        """Where the document of each sequence began; empty before the first token."""
        return self.layers[0].under_way

    def rows(self) -> int:
        """Rows of keys kept for one sequence and one kv head, over all parts, in the layer that has
        most."""
        return max(layer.rows() for layer in self.layers)
