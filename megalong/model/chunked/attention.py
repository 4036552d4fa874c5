"""x + attention(norm(x)) for a group of heads at a time, projections over tiles of the sequence.

Whole in memory are, for one group, queries, keys, values and output, and in the backward pass the
gradients of these; for all heads, the output, in whose place the gradient of the queries grows, and
the gradients of keys and values.

Shape suffixes: l rows of this tensor rank's own, s rows of all of them, b batch, h hidden, a heads,
g kv heads, d head_dim, n all that a matrix is applied to in a tile (rows x batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from megalong.model.chunked.norms import Moments, Norm, NormBackward, norm, norm_backward
from megalong.model.chunked.rotary import rotate_, scale_
from megalong.model.chunked.rows import ALONE, AttentionWeights, GradientSums, TensorRanks, tiles


class Passes(Protocol):
    """An attention of some heads, as two functions. kept: handed from the forward pass to backward,
    and to another forward pass of the same tensors."""

    def forward(
        self, q_bsad, k_bsgd, v_bsgd, kept: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]: ...

    def backward(
        self, grad_bsad, q_bsad, k_bsgd, v_bsgd, out_bsad, lse_bas, kept
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


class Attended(NamedTuple):
    """The output of all heads, and for each group the log-sum-exp and what its `Passes` keep."""

    out_sbad: torch.Tensor
    lse: list[torch.Tensor]
    kept: list[tuple[torch.Tensor, ...]]


class _Heads(NamedTuple):
    """The heads of a group, as slices of the query heads and of the kv heads."""

    queries: slice
    keys: slice


@dataclass(frozen=True)
class TiledAttention:
    """Attention with its norm, projections and residual connection.

    group: query heads for each kv head. passes: the attention of each group of heads, equally many
        in each.
    norm: also that before the output projection, where the weights have one. qk_norm: of each
        head's queries and keys. scales: of queries at so many positions on a device (`scale_`).
    tile_size: rows of the sequence in a tile, for each tensor rank that has rows of its own.
    ranks: those that share the matrices: each has some of the heads.
    """

    head_dim: int
    group: int
    passes: Sequence[Passes]
    norm: Norm
    tile_size: int
    qk_norm: Norm | None = None
    scales: Callable[[int, torch.device], torch.Tensor] | None = None
    ranks: TensorRanks = ALONE

    def attend(
        self,
        x_lbh: torch.Tensor,
        weights: AttentionWeights,
        angles_sd: torch.Tensor | None,
        kept: Sequence[tuple[torch.Tensor, ...]] | None = None,
    ) -> Attended:
        """Return the attention of norm(x), before the output projection; without autograd.

        angles: of the rotary encoding (s, head_dim / 2), float32; None: there is none.
        kept: what an earlier call with the same x left.
        """
        whole = None
        lses, all_kept = [], []
        for number, heads in enumerate(self._groups(weights)):
            q_sbad, k_sbgd, v_sbgd = self._project(x_lbh, weights, heads, angles_sd)
            out_bsad, lse, left = self.passes[number].forward(
                *(x.transpose(0, 1) for x in (q_sbad, k_sbgd, v_sbgd)),
                kept=None if kept is None else kept[number],
            )
            lses.append(lse)
            all_kept.append(left)
            if len(self.passes) == 1:
                whole = out_bsad.transpose(0, 1)
                break
            if whole is None:
                rows, batch = q_sbad.shape[:2]
                whole = x_lbh.new_empty(rows, batch, self._heads(weights)[0], self.head_dim)
            whole[:, :, heads.queries] = out_bsad.transpose(0, 1)
            del q_sbad, k_sbgd, v_sbgd, out_bsad
        return Attended(whole, lses, all_kept)

    def output_tile(
        self, x_lbh: torch.Tensor, rows: slice, out_sbad: torch.Tensor, weights: AttentionWeights
    ) -> torch.Tensor:
        """Return x + out @ weight of one tile of x."""
        out_tile = self.ranks.tile(out_sbad, rows).flatten(2)
        if weights.out_norm_weight is not None:
            moments = Moments.of(out_tile, self.norm, self.ranks)
            out_tile = moments.normed(out_tile, weights.out_norm_weight, weights.out_norm_bias)
        y_lbh = self.ranks.leave(F.linear(out_tile, weights.out_weight))
        if weights.out_bias is not None:
            y_lbh += weights.out_bias
        return y_lbh.add_(x_lbh[rows])

    def output_backward_tile(
        self,
        grad_lbh: torch.Tensor,
        rows: slice,
        out_sbad: torch.Tensor,
        weights: AttentionWeights,
        sums: GradientSums,
    ) -> NormBackward | None:
        """Add a tile's share of the gradients of the output projection and the norm before it.

        grad: of `output_tile`. Returns what `backward` needs of that norm, where there is one.
        """
        grad_sbh = self.ranks.enter(grad_lbh)
        out_sbr, back = self.ranks.tile(out_sbad, rows).flatten(2), None
        sums.add_bias("out", grad_lbh.flatten(0, 1))  # each rank counts its own rows
        if weights.out_norm_weight is not None:
            moments = Moments.of(out_sbr, self.norm, self.ranks)
            back, shares = NormBackward.of(
                grad_sbh @ weights.out_weight, out_sbr, moments, weights.out_norm_weight, self.ranks
            )
            sums.add_norm("out_norm", shares)
            out_sbr = moments.normed(out_sbr, weights.out_norm_weight, weights.out_norm_bias)
        sums.add_weight("out", grad_sbh.flatten(0, 1), out_sbr.flatten(0, 1))
        return back

    def backward(
        self,
        grad_lbh: torch.Tensor,
        x_lbh: torch.Tensor,
        attended: Attended,
        weights: AttentionWeights,
        angles_sd: torch.Tensor | None,
        sums: GradientSums,
        grad_x_lbh: torch.Tensor,
        out_norms: Sequence[NormBackward | None],
    ) -> None:
        """Fill in the gradient of x, which may be the same tensor as grad, after
        `output_backward_tile` of all tiles, whose results are `out_norms`. The output in `attended`
        is overwritten."""
        gradients = self._attention_backward(
            grad_lbh, x_lbh, attended, weights, angles_sd, sums, out_norms
        )
        for rows in tiles(len(x_lbh), self.tile_size):
            norm_inputs = (x_lbh[rows], weights.norm_weight, weights.norm_bias, *self.norm)
            normed_nh = self.ranks.enter(norm(*norm_inputs)).flatten(0, 1)
            grad_packed_nr = self._packed(
                *(self.ranks.tile(gradient, rows) for gradient in gradients)
            )
            sums.add_weight("qkv", grad_packed_nr, normed_nh)
            sums.add_bias("qkv", grad_packed_nr)
            grad_sbh = (grad_packed_nr @ weights.qkv_weight).unflatten(0, (-1, x_lbh.shape[1]))
            grad_tile, *shares = norm_backward(self.ranks.leave(grad_sbh), *norm_inputs)
            sums.add_norm("norm", shares)
            grad_x_lbh[rows] = grad_tile.add_(grad_lbh[rows])

    def _attention_backward(self, grad_lbh, x_lbh, attended, weights, angles_sd, sums, out_norms):
        """The gradients of all queries, keys and values as the projection made them."""
        out_sbad = attended.out_sbad
        all_dk = all_dv = None
        for number, heads in enumerate(self._groups(weights)):
            raw: list[torch.Tensor] = []
            q_sbad, k_sbgd, v_sbgd = self._project(x_lbh, weights, heads, angles_sd, raw)
            out_of_group = out_sbad[:, :, heads.queries]
            gradients = self.passes[number].backward(
                self._output_gradient(grad_lbh, weights, heads, out_of_group, out_norms).transpose(
                    0, 1
                ),
                *(x.transpose(0, 1) for x in (q_sbad, k_sbgd, v_sbgd)),
                out_of_group.transpose(0, 1),
                attended.lse[number],
                attended.kept[number],
            )
            del q_sbad, k_sbgd, v_sbgd
            dq_sbad, dk_sbgd, dv_sbgd = (x.transpose(0, 1) for x in gradients)
            del gradients
            self._scale_(dq_sbad, dk_sbgd)
            if angles_sd is not None:
                rotate_(dq_sbad, angles_sd, inverse=True)
                rotate_(dk_sbgd, angles_sd, inverse=True)
            if raw:
                for name, grad, x in zip(
                    ("q_norm", "k_norm"), (dq_sbad, dk_sbgd), raw, strict=True
                ):
                    self._norm_backward_(name, grad, x, weights, sums)
                del raw, grad, x
            if len(self.passes) == 1:
                return dq_sbad, dk_sbgd, dv_sbgd
            if all_dk is None:
                shape = (*out_sbad.shape[:2], self._heads(weights)[1], self.head_dim)
                all_dk, all_dv = (out_sbad.new_empty(shape) for _ in range(2))
            out_sbad[:, :, heads.queries] = dq_sbad  # this group's output has served
            all_dk[:, :, heads.keys] = dk_sbgd
            all_dv[:, :, heads.keys] = dv_sbgd
            del dq_sbad, dk_sbgd, dv_sbgd
        return out_sbad, all_dk, all_dv

    def _project(self, x_lbh, weights, heads: _Heads, angles_sd, raw: list | None = None):
        """Queries, keys and values of some heads, normed, rotated and scaled. raw: takes queries
        and keys as they were before their norm, if they have one."""
        width = (self.group + 2) * self.head_dim
        packed = slice(heads.keys.start * width, heads.keys.stop * width)
        weight_rh = weights.qkv_weight[packed]
        bias_r = None if weights.qkv_bias is None else weights.qkv_bias[packed]
        kv_heads = heads.keys.stop - heads.keys.start
        rows, batch = len(x_lbh) * self.ranks.shares, x_lbh.shape[1]
        q_sbad = x_lbh.new_empty(rows, batch, kv_heads * self.group, self.head_dim)
        k_sbgd, v_sbgd = (x_lbh.new_empty(rows, batch, kv_heads, self.head_dim) for _ in range(2))
        for tile in tiles(len(x_lbh), self.tile_size):
            normed_lbh = norm(x_lbh[tile], weights.norm_weight, weights.norm_bias, *self.norm)
            packed_sbr = F.linear(self.ranks.enter(normed_lbh), weight_rh, bias_r)
            packed_sbgd = packed_sbr.unflatten(2, (kv_heads, self.group + 2, self.head_dim))
            *_, k_tile, v_tile = packed_sbgd.unbind(3)
            self.ranks.put_tile(q_sbad, tile, packed_sbgd[:, :, :, : self.group].flatten(2, 3))
            self.ranks.put_tile(k_sbgd, tile, k_tile)
            self.ranks.put_tile(v_sbgd, tile, v_tile)
        if self.qk_norm is not None:
            if raw is not None:
                raw += q_sbad, k_sbgd
                q_sbad, k_sbgd = torch.empty_like(q_sbad), torch.empty_like(k_sbgd)
            before = raw or (q_sbad, k_sbgd)
            for name, out, x in zip(("q_norm", "k_norm"), (q_sbad, k_sbgd), before, strict=True):
                how = *_norm_of(name, weights), *self.qk_norm
                for tile in tiles(len(x), self.tile_size):
                    out[tile] = norm(x[tile], *how)
        if angles_sd is not None:
            rotate_(q_sbad, angles_sd)
            rotate_(k_sbgd, angles_sd)
        self._scale_(q_sbad, k_sbgd)
        return q_sbad, k_sbgd, v_sbgd

    def _scale_(self, q_sbad, k_sbgd) -> None:
        """Queries and keys, or their gradients, times their scales, in place."""
        if self.scales is not None:
            scales_sp = self.scales(len(q_sbad), q_sbad.device)
            scale_(q_sbad, scales_sp)
            scale_(k_sbgd, scales_sp, inverse=True)

    def _norm_backward_(self, name, grad_sbad, x_sbad, weights, sums) -> None:
        """From the gradient after the norm of queries or keys to that before it, in place."""
        weight, bias = _norm_of(name, weights)
        for rows in tiles(len(x_sbad), self.tile_size):
            before, *shares = norm_backward(
                grad_sbad[rows], x_sbad[rows], weight, bias, *self.qk_norm
            )
            grad_sbad[rows] = before
            sums.add_norm(name, shares)

    def _output_gradient(self, grad_lbh, weights, heads: _Heads, out_sbad, out_norms):
        """The gradient of the attention's output `out_sbad`, for some heads."""
        columns = slice(heads.queries.start * self.head_dim, heads.queries.stop * self.head_dim)
        weight_hr = weights.out_weight[:, columns]
        grad_sbad = torch.empty(out_sbad.shape, dtype=out_sbad.dtype, device=out_sbad.device)
        for rows, out_norm in zip(tiles(len(grad_lbh), self.tile_size), out_norms, strict=True):
            grad_sbr = self.ranks.enter(grad_lbh[rows]) @ weight_hr
            if out_norm is not None:
                out_sbr = self.ranks.tile(out_sbad, rows).flatten(2)
                grad_sbr = out_norm.gradient(grad_sbr, out_sbr, weights.out_norm_weight[columns])
            self.ranks.put_tile(grad_sbad, rows, grad_sbr.unflatten(2, (-1, self.head_dim)))
        return grad_sbad

    def _packed(self, q_sbad, k_sbgd, v_sbgd) -> torch.Tensor:
        """(n, rows of the projection): a tile of all heads in the order of the weight's rows."""
        q_sbgad = q_sbad.unflatten(2, (-1, self.group))
        packed = torch.cat((q_sbgad, k_sbgd.unsqueeze(3), v_sbgd.unsqueeze(3)), dim=3)
        return packed.flatten(2).flatten(0, 1)

    def _heads(self, weights: AttentionWeights) -> tuple[int, int]:
        """Query heads and kv heads of this tensor rank."""
        kv_heads = len(weights.qkv_weight) // ((self.group + 2) * self.head_dim)
        return kv_heads * self.group, kv_heads

    def _groups(self, weights: AttentionWeights) -> Iterator[_Heads]:
        kv_heads = self._heads(weights)[1] // len(self.passes)
        for start in range(0, kv_heads * len(self.passes), kv_heads):
            stop = start + kv_heads
            yield _Heads(slice(start * self.group, stop * self.group), slice(start, stop))


def _norm_of(name: str, weights: AttentionWeights):
    return getattr(weights, f"{name}_weight"), getattr(weights, f"{name}_bias")
