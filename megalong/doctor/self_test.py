"""One rank of the doctor's self-test: imports what training imports, a sum over both ranks, and
dilated attention, forward and backward, against its definition."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from megalong.attention import DilatedPattern, dilated_attention, dilated_attention_reference
from megalong.utils.command_line import filter_library_logs
from megalong.utils.machine import use_gpu


def main() -> None:
    start = time.perf_counter()
    filter_library_logs()
    import megalong.training.loop  # noqa: F401  # DeepSpeed, Megatron-core and all else

    rank = int(os.environ["RANK"])
    gpus = torch.cuda.device_count() if use_gpu() else 0
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    backend = "nccl" if gpus > 1 else "gloo"  # NCCL wants a GPU for each rank
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    total = torch.tensor([rank + 1.0], device=device if backend == "nccl" else "cpu")
    dist.all_reduce(total)
    if total.item() != 3:
        raise RuntimeError(f"{backend} sums 1 and 2 to {total.item()}")
    error = attention_error(device)
    if error > 1e-2:
        raise RuntimeError(f"dilated attention on {device} is off by {error:.1e}")
    dist.destroy_process_group()
    seconds = time.perf_counter() - start
    print(f"{backend} sums, attention on {device.type} is right to {error:.0e}, {seconds:.0f} s")


def attention_error(device: torch.device) -> float:
    """Largest difference to the reference in float64, in output and gradients of a small case."""
    torch.manual_seed(1)
    pattern = DilatedPattern((32, 64, 128), (1, 2, 3))
    inputs = [torch.randn(1, 100, heads, 32) for heads in (4, 2, 2)]

    def results(function, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = function(*tensors)
        out.square().sum().backward()
        return [tensor.detach().cpu().double() for tensor in (out, *(t.grad for t in tensors))]

    def defined(*tensors: torch.Tensor) -> torch.Tensor:
        return dilated_attention_reference(*tensors, pattern)[0]

    ours = results(partial(dilated_attention, pattern=pattern), [x.to(device) for x in inputs])
    theirs = results(defined, [x.double() for x in inputs])
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
