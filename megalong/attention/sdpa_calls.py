"""Dense attentions of one shape, computed in one call.

`InPlace` takes long ones where they are. Short ones, into which documents cut a sequence, are
`Gathered`: copied side by side. A call for each length would cost more than the arithmetic, so
lengths are rounded up to three binary digits. What is filled in repeats the last row of the piece:
no number of another document comes near it. A causal mask keeps such keys from the queries before
them, else a bias of -inf does; such queries are not written back, and have no gradient.

Rows are told by their numbers. Where all heads take the same positions, a row is all heads of a
position, numbered through the batch (batch * s); else it is one head of it (batch * s * heads).

Shape suffixes: p pieces, m query rows and n key rows of a piece, h heads of a row (1, or all),
r rows of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megalong.attention.sdpa_operators import attend, attend_backward

LONG = 256  # rows from which on a call of its own is cheaper than copies


class Part:
    """Dense attentions of one shape on strided views, side by side (`sdpa.Block`,
    `sdpa_bands.Piece`).

    first: no other part has written its rows before. count: how many, for each row of the batch.
    head_count: the heads of each.
    """

    first: bool
    count: int
    head_count: int

    def view_queries(self, x: torch.Tensor) -> torch.Tensor:
        """View the rows of a tensor like q: (batch, count, rows, heads, ...)."""
        raise NotImplementedError

    def view_keys(self, x: torch.Tensor) -> torch.Tensor:
        """View the rows of a tensor like k; one head where all share it."""
        raise NotImplementedError

    def turned(self, x_fhm: torch.Tensor) -> torch.Tensor:
        """Return the rows in the order in which causal attention takes them."""
        return x_fhm

    def fold(self, view: torch.Tensor) -> torch.Tensor:
        """(batch * count, heads, rows, ...) of a view, copied only if strides forbid a view."""
        return self.turned(view.transpose(2, 3).flatten(0, 1))

    def unfold(self, x_fhm: torch.Tensor) -> torch.Tensor:
        """A result (batch * count, heads, rows, ...) as the views are."""
        return self.turned(x_fhm).unflatten(0, (-1, self.count)).transpose(2, 3)

    def sum_shared(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The gradients of keys, unfolded, summed over the heads that share them."""
        return x


@dataclass(frozen=True)
class InPlace:
    """A part, computed where it is, on views of q, k and v: q, grad and out (batch, m, heads,
    head_dim), k and v (batch, n, kv_heads, head_dim), lse (batch, m, heads). out, lse and sums are
    in at least float32."""

    part: Part
    causal: bool

    def results(self, q, k, v, scale: float) -> list[torch.Tensor]:
        """Output and log-sum-exp as the part's views are."""
        folded = self._queries(q), self._keys(k), self._keys(v)
        return [self.part.unfold(x) for x in attend(*folded, self.causal, scale)]

    def gradients(self, grad, q, k, v, out, lse, scale: float) -> list[torch.Tensor]:
        """dq, dk and dv as the part's views are."""
        grad, q, out, lse = map(self._queries, (grad, q, out, lse))
        found = attend_backward(grad, q, self._keys(k), self._keys(v), out, lse, self.causal, scale)
        return [self.part.unfold(x) for x in found]

    def attend(self, q, k, v, scale: float, out, lse) -> None:
        """Merge this share of the softmax into out and lse, in place."""
        new_out, new_lse = self.results(q, k, v, scale)
        out, lse = self.part.view_queries(out), self.part.view_queries(lse)
        if self.part.first:
            out.copy_(new_out)
            lse.copy_(new_lse)
        else:
            merge(out, lse, new_out, new_lse)

    def attend_backward(self, grad, q, k, v, out, lse, scale: float, sums) -> None:
        """Add this share of the gradients to sums (dq, dk, dv), in place."""
        dq, *shares = self.gradients(grad, q, k, v, out, lse, scale)
        self.part.view_queries(sums[0]).add_(dq)
        for x_sums, share in zip(sums[1:], shares, strict=True):
            self.part.view_keys(x_sums).add_(self.part.sum_shared(share, x_sums.dtype))

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        return self.part.fold(self.part.view_queries(x))

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        """With as many heads as the queries."""
        x_fhn = self.part.fold(self.part.view_keys(x))
        return x_fhn.expand(-1, self.part.head_count, *x_fhn.shape[2:])


def merge(out, lse, new_out, new_lse) -> None:
    """Merge a partial softmax into the running one, in place.

    The weight of the new part is e^new / (e^old + e^new) = sigmoid(new - old): 1 where nothing
    was there yet (old = -inf).
    """
    new_lse = new_lse.to(lse.dtype)
    out.lerp_(new_out.to(out.dtype), torch.sigmoid(new_lse - lse)[..., None])
    torch.logaddexp(lse, new_lse, out=lse)


COPIED = 2**13  # rows of one head that are copied at once, so that memory stays bounded


class Pieces(NamedTuple):
    """Dense attentions, no query row in two of them.

    query, key: the numbers of the first rows. rows, keys: how many each has, all at least 1.
    Arrays of one shape; the steps to the next row are those of all.
    """

    query: np.ndarray
    key: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    query_step: int
    key_step: int


class Places(NamedTuple):
    """Rows of pieces, filled up to one length.

    rows_pm: their numbers, in a tensor. true: which of these, flattened, are no repetitions;
    padding: the others. Both None where there is no repetition. written: the numbers of the true
    ones.
    """

    rows_pm: torch.Tensor
    true: torch.Tensor | None
    padding: torch.Tensor | None
    written: torch.Tensor

    def take(self, x_bsh: torch.Tensor, one_head: bool) -> torch.Tensor:
        """(p, h, m, ...) of a tensor (batch, s, heads, ...)."""
        x_r = _rows(x_bsh, one_head).index_select(0, self.rows_pm.flatten())
        x_pm = x_r.unflatten(0, self.rows_pm.shape)
        return x_pm[:, None] if one_head else x_pm.transpose(1, 2)

    def true_rows(self, x_phm: torch.Tensor, one_head: bool) -> torch.Tensor:
        """The true ones of a result, as rows in the order of `written`."""
        x_pm = x_phm[:, 0] if one_head else x_phm.transpose(1, 2)
        x_r = x_pm.flatten(0, 1)
        return x_r if self.true is None else x_r.index_select(0, self.true)


@dataclass(frozen=True, eq=False)
class Gathered:
    """Pieces of one rounded shape, with the two functions of `InPlace`. Tensors
    (batch, s, heads, ...) that it writes to are contiguous.

    first: no other call has written its rows before. bias: (p, 1, 1, n), None where no query sees
    a key that was filled in.
    """

    queries: Places
    keys: Places
    one_head: bool
    causal: bool
    first: bool
    bias: torch.Tensor | None

    def attend(self, q, k, v, scale: float, out, lse) -> None:
        q_phmd = self._wide(self.queries.take(q, self.one_head))
        k_phnd, v_phnd = (self._keys(x, q.shape[2]) for x in (k, v))
        found = attend(q_phmd, k_phnd, v_phnd, self.causal, scale, self._bias(q_phmd))
        new_out, new_lse = (self.queries.true_rows(x, self.one_head) for x in found)
        rows, out_r, lse_r = self.queries.written, *(_rows(x, self.one_head) for x in (out, lse))
        if not self.first:
            old_out, old_lse = out_r.index_select(0, rows), lse_r.index_select(0, rows)
            merge(old_out, old_lse, new_out, new_lse)
            new_out, new_lse = old_out, old_lse
        out_r.index_copy_(0, rows, new_out.to(out.dtype))
        lse_r.index_copy_(0, rows, new_lse.to(lse.dtype))

    def attend_backward(self, grad, q, k, v, out, lse, scale: float, sums) -> None:
        taken = (self.queries.take(x, self.one_head) for x in (grad, q, out))
        grad_phmd, q_phmd, out_phmd = map(self._wide, taken)
        lse_phm = self.queries.take(lse, self.one_head)
        if self.queries.padding is not None:
            grad_rows = grad_phmd[:, 0] if self.one_head else grad_phmd.transpose(1, 2)
            grad_rows.flatten(0, 1).index_fill_(0, self.queries.padding, 0)
        k_phnd, v_phnd = (self._keys(x, q.shape[2]) for x in (k, v))
        dq, *shares = attend_backward(
            grad_phmd, q_phmd, k_phnd, v_phnd, out_phmd, lse_phm, self.causal, scale,
            self._bias(q_phmd),
        )  # fmt: skip
        self._add(sums[0], self.queries, dq)
        for x_sums, share in zip(sums[1:], shares, strict=True):
            if not self.one_head and share.shape[1] != x_sums.shape[2]:
                share = share.unflatten(1, (x_sums.shape[2], -1)).sum(2)
            self._add(x_sums, self.keys, share)

    def _keys(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """With as many heads as the queries."""
        x_phn = self._wide(self.keys.take(x, self.one_head))
        if self.one_head or x_phn.shape[1] == heads:
            return x_phn
        return x_phn.repeat_interleave(heads // x_phn.shape[1], 1)

    def _add(self, x_sums: torch.Tensor, places: Places, share: torch.Tensor) -> None:
        share_r = places.true_rows(share, self.one_head).to(x_sums.dtype)
        _rows(x_sums, self.one_head).index_add_(0, places.written, share_r)

    def _bias(self, q_phmd: torch.Tensor) -> torch.Tensor | None:
        return self.bias if self.bias is None else self.bias.to(q_phmd.dtype)

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        """In at least float32 on a CPU: for half precision it makes a kernel for each length,
        which takes longer than the attention."""
        if x.device.type != "cpu":
            return x
        return x.to(torch.promote_types(x.dtype, torch.float32))


Call = InPlace | Gathered


def gathered(
    pieces: Pieces, *, heads: int, one_head: bool, causal: bool, first: bool, device: torch.device
) -> Iterator[Gathered]:
    """The calls that compute the pieces. heads: of all queries. causal: query i of a piece sees
    the keys up to i; else all."""
    # Only there is an operator that takes a bias.
    fills_keys = causal or device.type == "cpu"
    long = rounded_up(pieces.rows), rounded_up(pieces.keys) if fills_keys else pieces.keys
    order = np.lexsort(long)
    shapes = np.stack(long)[:, order]
    ends = np.flatnonzero((shapes[:, 1:] != shapes[:, :-1]).any(0)) + 1
    for alike in np.split(order, ends) if len(order) else ():
        size_m, size_n = (int(x[alike[0]]) for x in long)
        at_once = max(COPIED // (max(size_m, size_n) * (1 if one_head else heads)), 1)
        for start in range(0, len(alike), at_once):
            these = alike[start : start + at_once]
            rows, keys = pieces.rows[these], pieces.keys[these]
            queries = _places(pieces.query[these], rows, size_m, pieces.query_step, device)
            if pieces.key is pieces.query and pieces.keys is pieces.rows:
                places = queries
            else:
                places = _places(pieces.key[these], keys, size_n, pieces.key_step, device)
            bias = None
            if not causal and (keys < size_n).any():
                seen_pn = np.arange(size_n) < keys[:, None]
                bias = torch.from_numpy(np.where(seen_pn, 0, -np.inf).astype(np.float32))
                bias = bias[:, None, None].to(device)
            yield Gathered(queries, places, one_head, causal, first, bias)


def prepared(calls: tuple[Call, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As the calls want them: contiguous where rows have numbers, else with the numbers of a row
    side by side."""
    if any(isinstance(call, Gathered) for call in calls):
        return tuple(x.contiguous() for x in tensors)
    return tuple(x if x.ndim < 4 or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def rounded_up(lengths: np.ndarray) -> np.ndarray:
    """To three binary digits."""
    unit = 1 << np.maximum(np.frexp(lengths)[1] - 3, 0)
    return -(-lengths // unit) * unit


def _places(
    first: np.ndarray, counts: np.ndarray, size: int, step: int, device: torch.device
) -> Places:
    """Rows `step` apart, filled up to a size by the last one."""
    place = np.arange(size)
    rows_pm = first[:, None] + step * np.minimum(place, counts[:, None] - 1)
    there = (place < counts[:, None]).ravel()
    rows, written = (torch.from_numpy(x).to(device) for x in (rows_pm, rows_pm.ravel()[there]))
    if there.all():
        return Places(rows, None, None, written)
    true, padding = (torch.from_numpy(np.flatnonzero(x)).to(device) for x in (there, ~there))
    return Places(rows, true, padding, written)


def _rows(x_bsh: torch.Tensor, one_head: bool) -> torch.Tensor:
    return x_bsh.flatten(0, 2 if one_head else 1)
