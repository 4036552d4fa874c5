"""Documents that share a row of a batch, and do not see each other. Travels in the exported folder.

A document is known by where it begins; segments, columns and turns of positions count on over the
whole row, as they did in the training.

Shape letters: b batch, s positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .configuration_longnet import LongNetConfig


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
        """Those of sequences whose real tokens come first; None where each is one document, which
        began at place 0. Raises ValueError where positions jump otherwise than to 0, and where
        nothing says where documents end.

        A document begins where its position is 0 and, if the model was trained on documents that
        are kept apart, behind an end-of-sequence token and at a beginning-of-sequence token.
        tokens: None where there are only their embeddings. counts: of the real tokens. starts: the
        place of each first one. under_way: what `following` was before.
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
        device, length = like.device, like.shape[1]
        places = torch.arange(length, device=device)
        counts_b1 = torch.tensor(counts, device=device)[:, None]
        begins_bs = torch.zeros(like.shape, dtype=torch.bool, device=device)
        ends_bs = begins_bs
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
        starts_b1 = torch.tensor(starts, device=device)[:, None]
        places_bs, begun_b1 = starts_b1 + places, torch.tensor(under_way, device=device)[:, None]
        first_bs = torch.where(begins_bs, places_bs, begun_b1).cummax(1).values
        last_b1 = counts_b1 - 1
        ended_b1 = ends_bs.gather(1, last_b1.clamp_min(0))
        following_b1 = torch.where(
            ended_b1, starts_b1 + counts_b1, first_bs.gather(1, last_b1.clamp_min(0))
        )
        following = torch.where(counts_b1 > 0, following_b1, begun_b1)[:, 0].tolist()
        if not any(following):  # they are in order: then all others are 0 too
            return None
        stop_bs = None
        if not config.causal:
            next_bs = torch.where(begins_bs, places_bs, starts_b1 + counts_b1)
            stop_bs = next_bs.flip(1).cummin(1).values.flip(1).roll(-1, 1)
            stop_bs[:, -1:] = starts_b1 + counts_b1
        return cls(first_bs, stop_bs, following)

    def to(self, device: torch.device, *_, **__) -> Documents:
        """On another device: accelerate, which spreads layers over several, asks for that."""
        stop_bs = None if self.stop_bs is None else self.stop_bs.to(device)
        return Documents(self.first_bs.to(device), stop_bs, self.following)

    def part(self, first: int, size: int) -> Documents:
        """Those of some of the positions."""
        here = slice(first, first + size)
        stop_bs = None if self.stop_bs is None else self.stop_bs[:, here]
        return Documents(self.first_bs[:, here], stop_bs, self.following)

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
