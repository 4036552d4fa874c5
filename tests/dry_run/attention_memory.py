"""Device memory of an attention's forward and backward on a shard, beside a whole sequence as long.

A process that has been given a fake GPU calls `attention_memory`; by hand:

    python tests/dry_run/attention_memory.py
"""

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()
import torch
import torch.distributed as dist

from megalong.attention.exchange import SequenceGroup
from megalong.attention.passes import Passes
from megalong.config.attention import AttentionConfig
from megalong.dry_run.fake_tensors import fake_device_tensors
from megalong.dry_run.memory import DeviceMemory
from megalong.utils.torch_private import FakeStore

HEADS, HEAD_DIM = 12, 64


def attention_memory(
    tokens: int, ranks: int, heads: int = HEADS, kind: str = "dilated"
) -> dict[str, float]:
    """Bytes a token at the peak of forward and of backward, inputs and results included, bfloat16.

    tokens: of a rank; the last rank, which attends to rows of all the others, is asked. heads: so
    many, the first of HEADS. kind: with its default pattern.
    """
    config = AttentionConfig(attention=kind).resolve(tokens * ranks)
    pattern, passes_class = config.pattern(0), config.kind(0).passes_class()
    dist.init_process_group("fake", rank=ranks - 1, world_size=ranks, store=FakeStore())
    try:
        sizes = passes_class.subgroup_sizes(pattern, tokens, ranks) if ranks > 1 else ()
        sequence = SequenceGroup.create(dist.group.WORLD, sizes)
        backend = "sdpa" if kind == "dense" else "triton"
        passes = passes_class(pattern.for_heads(HEADS, HEADS, 0, heads), sequence, backend=backend)
        with fake_device_tensors():
            return {name: peak / tokens for name, peak in step(passes, tokens, heads).items()}
    finally:
        dist.destroy_process_group()


def step(passes: Passes, tokens: int, heads: int) -> dict[str, int]:
    shape = 1, tokens, heads, HEAD_DIM
    peaks = {}
    with DeviceMemory() as memory, torch.device("cuda"):
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
        out, lse, kept = passes.forward(q, k, v)
        peaks["forward"] = memory.peak.total()
        grad = torch.empty_like(out)
        gradients = passes.backward(grad, q, k, v, out, lse, kept)
        peaks["backward"] = memory.peak.total()
        del gradients
    return peaks


def measured() -> dict[str, dict[str, float]]:
    """Peaks by case."""
    tokens, uneven = 2**18, 250_000  # no segment but the first of a branch begins with the second
    cases = {
        f"{heads} heads, {ranks} ranks": (tokens, ranks, heads)
        for heads in (HEADS, 3)
        for ranks in (1, 4, 8)
    }
    cases |= {f"uneven, {ranks} ranks": (uneven, ranks) for ranks in (1, 4)}
    cases |= {
        f"{kind}, {ranks} ranks": (2**16, ranks, HEADS, kind)
        for kind in ("dense", "local", "sparse")
        for ranks in (1, 2, 4, 8)
    }
    return {name: attention_memory(*case) for name, case in cases.items()}


def main() -> None:
    fake_device.pretend()
    for name, peaks in measured().items():
        numbers = ", ".join(f"{name} {peak:,.0f}" for name, peak in peaks.items())
        print(f"{name}: {numbers} bytes a token")


if __name__ == "__main__":
    main()
