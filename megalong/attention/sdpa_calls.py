"""Dense attentions of one shape, computed in one call.

What is to be computed comes in parts, each of them some dense attentions of one shape on views of
q, k and v: `sdpa_blocks` and `sdpa_bands`. A long part is computed where it is. Short ones of one
shape are copied side by side: documents cut a sequence into many, of many lengths, and n rows hold
pieces of at most sqrt(2 n) lengths. Nothing is padded.

Shape suffixes: b batch, h heads, m query rows, n key rows, f whatever is folded together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from megalong.attention.sdpa_operators import attend, attend_backward

LONG = 256  # rows from which on a call of its own is cheaper than copies
COPIED = 2**16  # rows of all heads that are copied at once, so that memory stays bounded


class Part(Protocol):
    """Dense attentions of one shape.

    rows: of queries, in each. first: no other part has written these before it. count, head_count:
    how many attentions (in a row of the batch, if it is of all), and the heads of each. of_batch:
    the row of the batch that it is of; None: of all. shape: what those agree in that can be copied
    side by side.
    """

    rows: int
    first: bool
    count: int
    head_count: int
    of_batch: int | None
    shape: tuple

    def fold_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Of a tensor like q: (f, heads, rows, ...), copied only where strides forbid a view."""
        ...

    def fold_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Of a tensor like k; one head where all share it."""
        ...

    def view_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor like q, to write to."""
        ...

    def view_keys(self, x: torch.Tensor) -> torch.Tensor: ...

    def unfold(self, x_fhm: torch.Tensor) -> torch.Tensor:
        """A result (f, heads, rows, ...) as the views are."""
        ...


class Call(NamedTuple):
    """Parts that are computed at once: several only if each is of one row of the batch."""

    parts: tuple[Part, ...]

    def attend(self, q, k, v, causal: bool, scale: float) -> Iterator[tuple]:
        """Yields each part, and its output and log-sum-exp as its views are."""
        results = attend(self._queries(q), self._keys(k), self._keys(v), causal, scale)
        return zip(self.parts, *map(self._apart, results), strict=True)

    def attend_backward(self, grad, q, k, v, out, lse, causal: bool, scale: float) -> Iterator:
        """Yields each part and its gradients (dq, dk, dv) as its views are."""
        queries, keys = map(self._queries, (grad, q, out, lse)), map(self._keys, (k, v))
        (grad, q, out, lse), (k, v) = map(self._wide, queries), map(self._wide, keys)
        gradients = attend_backward(grad, q, k, v, out, lse, causal, scale)
        return zip(self.parts, *map(self._apart, gradients), strict=True)

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        return _side_by_side([part.fold_queries(x) for part in self.parts])

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        """With as many heads as the queries."""
        x_fhn = _side_by_side([part.fold_keys(x) for part in self.parts])
        return x_fhn.expand(-1, self.parts[0].head_count, *x_fhn.shape[2:])

    def _apart(self, x_fhm: torch.Tensor) -> list[torch.Tensor]:
        if len(self.parts) == 1:
            return [self.parts[0].unfold(x_fhm)]
        shares = x_fhm.split([part.count for part in self.parts])
        return [part.unfold(share) for part, share in zip(self.parts, shares, strict=True)]

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        """Short parts in at least float32 on a CPU: for half precision it makes a kernel for each
        length, which takes longer than the attention."""
        if _stands_alone(self.parts[0]) or x.device.type != "cpu":
            return x
        return x.to(torch.promote_types(x.dtype, torch.float32))


def in_calls(parts: Iterable[Part]) -> tuple[Call, ...]:
    """The calls that compute the parts; what is written first comes first."""
    calls = []
    alike: dict[tuple, list[Part]] = defaultdict(list)
    for part in parts:
        if _stands_alone(part):
            calls.append(Call((part,)))
        else:
            alike[(part.first, part.rows, part.head_count, *part.shape)].append(part)
    for members in alike.values():
        calls += map(Call, _portions(members))
    return tuple(sorted(calls, key=lambda call: not call.parts[0].first))


def _stands_alone(part: Part) -> bool:
    return part.of_batch is None or part.count * part.rows >= LONG


def _portions(parts: list[Part]) -> Iterator[tuple[Part, ...]]:
    """As many at a time as may be copied."""
    portion, size = [], 0
    for part in parts:
        rows = part.count * part.head_count * part.rows
        if portion and size + rows > COPIED:
            yield tuple(portion)
            portion, size = [], 0
        portion.append(part)
        size += rows
    yield tuple(portion)


def _side_by_side(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
