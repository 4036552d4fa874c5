"""Where tokens are: in the sequence, in documents that share it, and beside padding. Travels in the
exported folder.

Positions are turns of channels (RoPE), and scales besides (xPos). Segments, columns and turns count
from the first real token of a sequence, over all of its documents, as they did in the training.

Shape letters: b batch, s positions, h heads, d channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megalong.model.rope_scaling import rope_frequencies

from .configuration_longnet import LongNetConfig


def rotary_angles(config: LongNetConfig, starts: list[int], length: int, device):
    """Cosines and sines, (b or 1, s, 1, head_dim) each, of the positions from each start on; with
    YaRN times its attention factor.

    The angle is computed in float64 and reduced to one turn, and only then becomes float32: a
    float32 position loses its fraction of a turn long before a million tokens.
    """
    frequencies, factor = rope_frequencies(config.rope_parameters, config.head_dim)
    frequencies = torch.tensor(frequencies, dtype=torch.float64, device=device)
    angles = positions_from(starts, length, device) * frequencies
    angles = angles.remainder_(2 * math.pi).float()
    angles = torch.cat((angles, angles), -1)[:, :, None]
    return angles.cos() * factor, angles.sin() * factor


def positions_from(starts: list[int], length: int, device):
    """So many positions from each start on, (b or 1, s, 1), float64."""
    starts = torch.tensor(starts if len(set(starts)) > 1 else starts[:1], device=device)
    return (starts[:, None].double() + torch.arange(length, device=device))[..., None]


def xpos_scales(config: LongNetConfig, starts: list[int], length: int, device):
    """What queries are multiplied by, and keys divided, (b or 1, s, 1, head_dim), float32: they
    count from the middle of the training's sequence."""
    positions = positions_from(starts, length, device) - config.max_position_embeddings // 2
    scales = (positions * xpos_decays(config).to(device)).exp_().float()
    return torch.cat((scales, scales), -1)[:, :, None]


def xpos_decays(config: LongNetConfig):
    """Logarithm of what the score of each pair of channels decays by in one position, float64."""
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return ((channels + 0.4) / 1.4).log() / config.xpos_scale_base


def check_length(config: LongNetConfig, tokens: int, dtype: torch.dtype) -> None:
    """Raise ValueError where so many tokens are more than xPos can scale: at the first or the last
    it would take more than half of the format's exponents, and leave the values too few."""
    if config.position_embedding_type != "xpos":
        return
    middle = config.max_position_embeddings // 2
    smallest = max(torch.finfo(dtype).tiny, torch.finfo(torch.float32).tiny)  # scales are float32
    reach = math.floor(math.log(smallest) / 2 / float(xpos_decays(config)[0]))
    if max(middle, tokens - middle) <= reach:
        return
    way_out = f"give at most {middle + reach}" if middle <= reach else "load it in bfloat16"
    raise ValueError(
        f"xPos has no room for {tokens} tokens in {str(dtype).removeprefix('torch.')}: {way_out}"
    )


def rotate(x_bshd, cos, sin):
    """Turn pairs of channels, half a head apart (RoPE, arXiv 2104.09864)."""
    one, other = x_bshd.chunk(2, -1)
    return x_bshd * cos.to(x_bshd.dtype) + torch.cat((-other, one), -1) * sin.to(x_bshd.dtype)


@dataclass(frozen=True)
class Documents:
    """Where the document of each position lies, in places of its sequence: int64.

    first_bs: the place of its first token. stop_bs: the place after its last one, where attention
    looks both ways. following: of each sequence, the first place of the document that its next
    token will belong to, if it begins none.
    """

    first_bs: torch.Tensor
    stop_bs: torch.Tensor | None
    following: list[int]

    @classmethod
    def of(
        cls,
        config: LongNetConfig,
        tokens_bs: torch.Tensor | None,
        positions_bs: torch.Tensor | None,
        counts: list[int],
        starts: list[int],
        under_way: list[int],
    ) -> Documents | None:
        """Return those of sequences whose real tokens come first; None where each is one document,
        which began at place 0.

        A document begins where its position is 0 and, if the model was trained on documents that
        are kept apart, behind an end-of-sequence token and at a beginning-of-sequence token.
        tokens: None where there are only their embeddings. counts: of the real tokens. starts: the
        place of each first one. under_way: what `following` was before.
        Raises ValueError where positions jump otherwise than to 0, and where nothing says where
        documents end.
        """
        isolated = config.document_attention == "isolated"
        if isolated and tokens_bs is None and positions_bs is None:
            raise ValueError(
                "the model keeps documents apart, and embeddings do not say where they end: give"
                " position_ids, which begin at 0 with each document"
            )
        isolated = isolated and tokens_bs is not None
        if not (isolated or positions_bs is not None or any(under_way)):
            return None
        like = tokens_bs if positions_bs is None else positions_bs
        if like is None:
            raise ValueError("documents that were begun go on: give their position_ids")
        counts_b1, starts_b1, begun_b1 = (
            torch.tensor(x, device=like.device)[:, None] for x in (counts, starts, under_way)
        )
        places = torch.arange(like.shape[1], device=like.device)
        begins_bs = ends_bs = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        if positions_bs is not None:
            begins_bs = positions_bs == 0
            jumps_bs = (positions_bs.diff() != 1) & ~begins_bs[:, 1:]
            if (jumps_bs & (places[1:] < counts_b1)).any():
                raise ValueError(
                    "position_ids must go up by one, or be 0 where another document begins:"
                    " positions count on over a sequence whatever they are"
                )
        if isolated:
            ends_bs = _are(tokens_bs, config.eos_token_id)
            begins_bs = begins_bs | _are(tokens_bs, config.bos_token_id)
            begins_bs[:, 1:] |= ends_bs[:, :-1]
        places_bs, stop_b1 = starts_b1 + places, starts_b1 + counts_b1
        first_bs = torch.where(begins_bs, places_bs, begun_b1).cummax(1).values
        last_b1 = (counts_b1 - 1).clamp_min(0)
        following_b1 = torch.where(ends_bs.gather(1, last_b1), stop_b1, first_bs.gather(1, last_b1))
        following = torch.where(counts_b1 > 0, following_b1, begun_b1)[:, 0].tolist()
        if not any(following):  # they are in order: then all others are 0 too
            return None
        stop_bs = None
        if not config.causal:
            next_bs = torch.where(begins_bs, places_bs, stop_b1)
            stop_bs = next_bs.flip(1).cummin(1).values.flip(1).roll(-1, 1)
            stop_bs[:, -1:] = stop_b1
        return cls(first_bs, stop_bs, following)

    def to(self, device: torch.device, *_, **__) -> Documents:
        """On another device: accelerate, which spreads layers over several, asks for that."""
        return self._each(lambda x_bs: x_bs.to(device))

    def part(self, first: int, size: int) -> Documents:
        """Those of some of the positions."""
        return self._each(lambda x_bs: x_bs[:, first : first + size])

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Documents:
        stop_bs = None if self.stop_bs is None else change(self.stop_bs)
        return Documents(change(self.first_bs), stop_bs, self.following)

    def seen(self, length: int) -> torch.Tensor:
        """Which of so many keys the queries at the same places may see, (b, 1, s, length)."""
        places = torch.arange(length, device=self.first_bs.device)
        seen_bss = places >= self.first_bs[:, :, None]
        if self.stop_bs is not None:
            seen_bss &= places < self.stop_bs[:, :, None]
        return seen_bss[:, None]


def _are(tokens_bs: torch.Tensor, ids: int | list[int] | None) -> torch.Tensor:
    if ids is None:
        return torch.zeros_like(tokens_bs, dtype=torch.bool)
    return torch.isin(tokens_bs, torch.tensor(ids, device=tokens_bs.device))


class Padding:
    """Where the real tokens of a batch are. length: with padding. counts: how many each sequence
    has."""

    def __init__(self, length: int, counts: list[int], order: torch.Tensor | None):
        self.length, self.counts, self.order = length, counts, order

    @classmethod
    def of(cls, attention_mask: torch.Tensor | None, batch: int, length: int) -> Padding:
        if attention_mask is None:
            return cls(length, [length] * batch, None)
        if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
            raise ValueError(
                "attention_mask must be (batch, sequence) with 0 for padding, got shape"
                f" {tuple(attention_mask.shape)} for a sequence of {length}"
            )
        real = attention_mask[:, attention_mask.shape[1] - length :].bool()
        counts = real.sum(1).tolist()
        if min(counts) == length:
            return cls(length, counts, None)
        return cls(length, counts, torch.argsort((~real).int(), dim=1, stable=True))

    def to_end(self, x):
        """Rows of a batch with their padding moved behind the real tokens."""
        return x if self.order is None else _pick(x, self.order)

    def back(self, x):
        """Undo `to_end`."""
        return x if self.order is None else _pick(x, torch.argsort(self.order, dim=1))

    def square_back(self, x_bhss):
        """Undo `to_end` for a square of positions."""
        if self.order is None:
            return x_bhss
        back = torch.argsort(self.order, dim=1)[:, None]
        x_bhss = x_bhss.gather(2, back[..., None].expand_as(x_bhss))
        return x_bhss.gather(3, back[..., None, :].expand_as(x_bhss))


def _pick(x_bsd, order_bs):
    return x_bsd.gather(1, order_bs[..., None].expand(-1, -1, x_bsd.shape[2]))
