"""Documents that begin anywhere, and what they forbid, by its definition."""

from __future__ import annotations

import random

import torch


def random_ids(seed: int, batch: int, length: int) -> torch.Tensor:
    """(batch, length): the number of the document of each position. One document, many of one
    token, some of any length, and such as begin near multiples of a number: in each row of the
    batch another kind."""
    draw = random.Random(seed)
    rows = []
    for _ in range(batch):
        often, width = draw.choice((0.0, 0.03, 0.3, 1.0)), draw.randint(1, max(length // 2, 1))
        begins = torch.zeros(length, dtype=torch.int64)
        for position in range(1, length):
            begins[position] = draw.random() < often
        if draw.random() < 0.5:
            first = max(draw.choice((0, 1, width - 1)), 1)
            begins[first::width] = 1
        rows.append(begins.cumsum(0))
    return torch.stack(rows)


def same_document(ids: torch.Tensor) -> torch.Tensor:
    """(batch, length, length) booleans: both positions are of one document."""
    return ids[:, :, None] == ids[:, None]


def bounds(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """document_start and document_stop."""
    same = same_document(ids).to(torch.int32)
    start = same.argmax(-1).to(torch.int32)
    return start, start + same.sum(-1, dtype=torch.int32)
