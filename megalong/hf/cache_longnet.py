"""The decode cache. Travels in the exported folder.

While decoding, a later query sees of a branch only the rows of its own segment, and of a window
only the last positions (`parts_longnet`): the cache keeps those and no more, whatever the
length of the sequence.

Shape letters: b batch, s positions, h query heads, k kv heads, d head_dim, g streams (kv heads at
one offset), n rows of a part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from .attention_longnet import NEVER, attention
from .documents_longnet import Documents


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
