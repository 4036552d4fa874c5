"""Stacks of layers whose activations wait on the host, on a GPU that is not there.

Writes as JSON to the file it is given, for each stack, {"device", "host", "out", "into"}: bytes at
the peak, and numbers of copies in a step; and for each copy that is planted, the error or None.
"""

import contextlib
import json
import sys
from pathlib import Path

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()
    import torch

    fake_device.pretend()
else:
    import torch

from megalong.dry_run.fake_tensors import HostSync, HostSyncs, fake_device_tensors
from megalong.dry_run.memory import DeviceMemory
from megalong.model.chunked.offload import CudaTransfers, HostOffload

TOKENS, WIDTH = 2**20 + 1, 64
BYTES = 2 * TOKENS * WIDTH  # of one activation in bfloat16


class Layer(torch.autograd.Function):
    """Keeps two tensors of x's size, and one too small for the host."""

    @staticmethod
    def forward(ctx, x, weight):
        inner = x @ weight
        ctx.save_for_backward(x, inner, weight, inner[:, 0].clone())
        return x + inner.tanh()

    @staticmethod
    def backward(ctx, grad):
        x, inner, weight, _ = ctx.saved_tensors
        grad_inner = grad * (1 - inner.tanh().square())
        return grad + grad_inner @ weight.T, x.T @ grad_inner


class Counted(CudaTransfers):
    """Counts the copies."""

    def __init__(self, device):
        super().__init__(device)
        self.out = self.into = 0

    def copy(self, target, source):
        self.out += target.device.type == "cpu"
        self.into += source.device.type == "cpu"
        super().copy(target, source)


def step(layers: int, *, offloaded: bool) -> dict[str, int]:
    device = torch.device("cuda", 0)
    transfers = Counted(device)
    with fake_device_tensors(), HostSyncs(()), DeviceMemory() as memory:
        offload = HostOffload(device, transfers=transfers)
        saving = offload.saving if offloaded else contextlib.nullcontext
        weights = [
            torch.nn.Parameter(torch.empty(WIDTH, WIDTH, dtype=torch.bfloat16, device=device))
            for _ in range(layers)
        ]
        for _ in range(2):  # the second step takes no more of the host
            transfers.out = transfers.into = 0
            x = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device=device)
            x.requires_grad_()
            x = x * 1
            for weight in weights:
                with saving():
                    x = Layer.apply(x, weight)
            x.sum().backward()
            del x
    return {
        "device": memory.peak.total(),
        "host": memory.host_peak,
        "out": transfers.out,
        "into": transfers.into,
    }


def caught(action) -> str | None:
    with fake_device_tensors(), HostSyncs(()):
        try:
            action()
        except HostSync as error:
            return str(error)
    return None


def main(output: str) -> None:
    results = {}
    for layers in (4, 8):
        results[f"{layers} kept"] = step(layers, offloaded=False)
        results[f"{layers} offloaded"] = step(layers, offloaded=True)
    shape = (2**20,)
    gpu = {"device": "cuda"}
    results["pageable"] = caught(
        lambda: torch.empty(shape).copy_(torch.empty(shape, **gpu), non_blocking=True)
    )
    results["blocking"] = caught(
        lambda: torch.empty(shape, pin_memory=True).copy_(torch.empty(shape, **gpu))
    )
    results["blocking back"] = caught(
        lambda: torch.empty(shape, **gpu).copy_(torch.empty(shape, pin_memory=True))
    )
    results["pinned"] = caught(
        lambda: torch.empty(shape, pin_memory=True)[:5].copy_(
            torch.empty(5, **gpu), non_blocking=True
        )
    )
    with fake_device_tensors():
        results["small"] = torch.ones(3, pin_memory=True).tolist()
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
