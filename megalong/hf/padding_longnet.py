"""Batches with padding. Travels in the exported folder.

The model moves the real tokens of each row to its front, where a causal model never looks at what
comes after them and a bidirectional one hides it, and moves the results back.

Shape letters: b batch, s sequence, h heads, d channels.
"""

from __future__ import annotations

import torch


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
        """Undoes `to_end`."""
        return x if self.order is None else _pick(x, torch.argsort(self.order, dim=1))

    def square_back(self, x_bhss):
        """Undoes `to_end` for a square of positions, with zeros where one of them is padding."""
        if self.order is None:
            return x_bhss
        places = torch.arange(x_bhss.shape[-1], device=x_bhss.device)
        real = places < torch.tensor(self.counts, device=x_bhss.device)[:, None]
        x_bhss = x_bhss.masked_fill(~(real[:, None, :, None] & real[:, None, None]), 0.0)
        back = torch.argsort(self.order, dim=1)[:, None]
        x_bhss = x_bhss.gather(2, back[..., None].expand_as(x_bhss))
        return x_bhss.gather(3, back[..., None, :].expand_as(x_bhss))


def _pick(x_bsd, order_bs):
    return x_bsd.gather(1, order_bs[..., None].expand(-1, -1, x_bsd.shape[2]))
