"""Latency and bandwidth between the ranks of a launch, and how much of it computation hides."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from megalong.dry_run.calibration.clock import Clock

SIZES = {"cpu": (2**14, 2**18, 2**21, 2**24), "cuda": (2**18, 2**22, 2**26, 2**28)}  # bytes
SMALL = 64  # bytes of a rank's part of a call that is all latency

# Of a collective of S bytes between n ranks in one node (`megalong.dry_run.collectives`): bytes
# that go through a rank as a share of S, and steps.
THROUGH: dict[str, Callable[[int], tuple[float, int]]] = {
    "all_reduce": lambda n: (2 * (n - 1) / n, 2 * (n - 1)),
    "all_gather": lambda n: ((n - 1) / n, n - 1),
    "reduce_scatter": lambda n: ((n - 1) / n, n - 1),
    "all_to_all": lambda n: ((n - 1) / n, n - 1),
    "broadcast": lambda n: (1.0, n - 1),
    "send": lambda n: (1.0, 1),
}


def collective(name: str, size: int, device: torch.device) -> Callable[[], object]:
    """A call of all ranks whose larger buffer has so many bytes."""
    n = dist.get_world_size()
    whole = torch.zeros(size // 4 // n * n, device=device)
    part = torch.zeros(len(whole) // n, device=device)
    other = torch.empty_like(whole)
    return {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_to_all": lambda: dist.all_to_all_single(other, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "send": lambda: _there_and_back(whole),
    }[name]


def _there_and_back(tensor: torch.Tensor) -> None:
    """Between ranks 0 and 1, and between those that follow in pairs."""
    rank = dist.get_rank()
    other = rank ^ 1
    if other >= dist.get_world_size():
        return
    for sends in (rank < other, rank > other):
        if sends:
            dist.send(tensor, other)
        else:
            dist.recv(tensor, other)


def seconds(clock: Clock, name: str, size: int) -> float:
    """Of one call, which all ranks begin together."""
    call = collective(name, size, clock.device)
    found = clock.seconds_together(call)
    return found / 2 if name == "send" else found


def overlap(clock: Clock, size: int = 2**24) -> float:
    """The share of a collective's time that computation hides which runs beside it."""
    whole = torch.zeros(size // 4, device=clock.device)
    matrix = torch.ones(512, 512, device=clock.device)
    communicating = clock.seconds_together(lambda: dist.all_reduce(whole))
    products = max(1, round(communicating / clock.seconds_together(lambda: matrix @ matrix)))

    def compute() -> None:
        for _ in range(products):
            matrix @ matrix

    def both() -> None:
        work = dist.all_reduce(whole, async_op=True)
        compute()
        work.wait()

    computing, together = clock.seconds_together(compute), clock.seconds_together(both)
    hidden = computing + communicating - together
    return min(1.0, max(0.0, hidden / min(computing, communicating)))
