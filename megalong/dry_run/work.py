"""What one rank does in a training step: its operations and its collectives, each with how often.

A dry run writes it down, the cost model makes seconds of it. Nothing in it depends on the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# What a part of the model does, and when. "update" is once a step: the reduction of gradients that
# is not done in the backward pass, the norm, the optimizer.
PARTS = ("embedding", "attention", "projections", "mlp", "logits", "other", "optimizer")
DIRECTIONS = ("forward", "backward", "update")

# How an operation is bound: products of matrices, attention's kernels, the memory alone, or the
# host's memory, where the host computes: an optimizer that lives there (ZeRO-Offload).
KINDS = ("product", "attention", "memory", "host")

# What memory of the device is for: see `megalong.dry_run.memory`.
MEMORY = (
    "weights", "gradients", "optimizer", "activations", "temporaries", "collectives", "tables",
)  # fmt: skip

# Names of the copies between the device and the host: their bytes go over the link between the two,
# and no kernel is launched for them.
TO_HOST, TO_DEVICE = "megalong.to_host", "megalong.to_device"


@dataclass(frozen=True, order=True)
class Operation:
    """A call of an operator that does work (a view does none).

    part, direction, kind: of `PARTS`, `DIRECTIONS`, `KINDS`.
    name: the operator's, with its namespace ("aten.mm").
    dtype: as PyTorch writes it without "torch." ("bfloat16"): of what products and attention
        multiply, whatever they add up in; of others' results.
    flops: of products and attention; 0 for others.
    bytes: read and written, each tensor once; of the host's memory where the host computes.
    kernels: launches on the device, which of the host are none.
    """

    part: str
    direction: str
    kind: str
    name: str
    dtype: str
    flops: int
    bytes: int
    kernels: int = 1


@dataclass(frozen=True, order=True)
class Collective:
    """A call that the ranks of a group make together.

    axis: of the mesh, as in `megalong.parallel.traffic`. name: as there ("all_gather").
    bytes: of the larger of the call's buffers, as there.
    ranks: global ranks of the group, ascending; of "send" and "receive" the two that take part.
    """

    axis: str
    direction: str
    name: str
    bytes: int
    ranks: tuple[int, ...]


@dataclass
class Work:
    """operations, collectives: calls of a rank in one training step, all its micro batches."""

    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[Collective] = field(default_factory=Counter)

    def plus(self, other: Work, times: int = 1) -> Work:
        """This and, so often, another; less, where that is negative."""
        sums = []
        for mine, more in (
            (self.operations, other.operations),
            (self.collectives, other.collectives),
        ):
            total = Counter(mine)
            for call, count in more.items():
                total[call] += times * count
            sums.append(Counter({call: count for call, count in total.items() if count}))
        return Work(*sums)

    def flops(self) -> Counter[tuple[str, str]]:
        """FLOPs by part and direction."""
        return self._total("flops")

    def bytes(self) -> Counter[tuple[str, str]]:
        """Bytes of memory that are read and written, by part and direction."""
        return self._total("bytes")

    def kernels(self) -> Counter[tuple[str, str]]:
        """Launches, by part and direction."""
        return self._total("kernels")

    def launches(self, directions: Iterable[str] = DIRECTIONS) -> int:
        """What the host starts on the device in these directions: kernels and collectives."""
        kernels = sum(n for (_, direction), n in self.kernels().items() if direction in directions)
        return kernels + sum(n for c, n in self.collectives.items() if c.direction in directions)

    def traffic(self) -> dict[str, dict[str, dict[str, int]]]:
        """Axis -> collective -> {"calls", "bytes"}, as `megalong.parallel.traffic` counts."""
        counts: dict[str, dict[str, dict[str, int]]] = {}
        for collective, calls in self.collectives.items():
            count = counts.setdefault(collective.axis, {})
            count = count.setdefault(collective.name, {"calls": 0, "bytes": 0})
            count["calls"] += calls
            count["bytes"] += calls * collective.bytes
        return counts

    def _total(self, what: str) -> Counter[tuple[str, str]]:
        total: Counter[tuple[str, str]] = Counter()
        for operation, calls in self.operations.items():
            total[operation.part, operation.direction] += calls * getattr(operation, what)
        return total
