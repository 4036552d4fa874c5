"""Dense attention over a sharded sequence: the ring of keys beside gathering all of them.

On this machine, with gloo (some minutes on two cores):

    python tools/benchmarks/dense_ring.py --output runs/dense-ring

With NCCL, on as many GPUs as there are: --device cuda --ranks 2 4 8 --dtype bfloat16.

Both compute one layer, causal, forward and backward, and take turns, so that a slow moment of the
machine hits both. "gather" has each rank get all keys and values at once and attend with its shard
of the queries, of which the last rank's see nearly all keys, and the first's nearly none; "ring" is
`megalong.attention.dense`. Bytes are what rank 0 sends, by the ring beside those of the formula in
its docstring. Writes dense_ring.json into --output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import torch
    import torch.distributed as dist
    from ranks import is_rank, join, measured_on

    from megalong.attention import DilatedPattern
    from megalong.attention.dense import DensePasses, Ring
    from megalong.attention.dilated import DilatedPasses
    from megalong.attention.exchange import SequenceGroup
    from megalong.attention.patterns import DensePattern
    from megalong.parallel.traffic import CountTraffic


def main() -> None:
    args = parse_arguments()
    if is_rank():
        measure_as_rank(args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for ranks in args.ranks:
        for length in args.lengths:
            rows.append(measured_on(ranks, args.output, "--lengths", str(length)))
            print(row_text(rows[-1]), flush=True)
    (args.output / "dense_ring.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"wrote {args.output}/dense_ring.json")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 4, 8], help="processes to measure with")
    add("--lengths", type=int, nargs="+", default=[4096, 16384], help="sequence lengths, in tokens")
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=4)
    add("--head-dim", type=int, default=64)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--repeats", type=int, default=5, help="medians are over so many runs")
    add("--output", type=Path, default=Path("runs/dense-ring"))
    return parser.parse_args()


def row_text(row: dict) -> str:
    return (
        f"{row['ranks']} ranks, {row['sequence_length']:,} tokens: ring {row['ring_seconds']:.2f}"
        f" s, gather {row['gather_seconds']:.2f} s, {row['speedup']:.2f} x as fast (median of"
        f" runs); {row['ring_bytes']:,} bytes (formula: {row['formula_bytes']:,}), busiest rank"
        f" {row['imbalance']:.4f} x the mean"
    )


def measure_as_rank(args) -> None:
    device = join(args.device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    length, dtype = args.lengths[0], getattr(torch, args.dtype)
    shard, whole = length // ranks, DilatedPattern((length,), (1,))
    sizes = DilatedPasses.subgroup_sizes(whole, shard, ranks)
    sequence = SequenceGroup.create(dist.group.WORLD, sizes)
    ways = {
        "ring": DensePasses(DensePattern(), sequence),
        "gather": DilatedPasses(whole, sequence),
    }
    q, grad, k, v = (
        torch.randn(1, shard, heads, args.head_dim, device=device, dtype=dtype)
        for heads in (args.heads, args.heads, args.kv_heads, args.kv_heads)
    )

    def layer(passes) -> float:
        dist.barrier()
        start = time.perf_counter()
        out, lse, kept = passes.forward(q, k, v)
        passes.backward(grad, q, k, v, out, lse, kept)
        if args.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - start

    bytes_ = {}
    for name, passes in ways.items():  # which warms up, too
        with CountTraffic({}) as counter:
            layer(passes)
        calls = counter.counts["other"]
        bytes_[name] = sum(count["bytes"] for call, count in calls.items() if call != "barrier")
    times = [{name: layer(passes) for name, passes in ways.items()} for _ in range(args.repeats)]
    pairs = torch.tensor(pairs_of(Ring(sequence, shard, causal=True)))
    of_ranks = [torch.empty_like(pairs) for _ in range(ranks)]
    dist.all_gather(of_ranks, pairs)
    if rank == 0:
        of_ranks = [int(x) for x in of_ranks]
        seconds = {f"{name}_seconds": statistics.median(t[name] for t in times) for name in ways}
        row = {
            "ranks": ranks, "sequence_length": length, **seconds,
            "speedup": statistics.median(t["gather"] / t["ring"] for t in times),
            "ring_bytes": bytes_["ring"], "gather_bytes": bytes_["gather"],
            "formula_bytes": formula_bytes(args, ranks, shard),
            "imbalance": max(of_ranks) / (sum(of_ranks) / ranks),
        }  # fmt: skip
        args.output.write_text(json.dumps(row))
    dist.destroy_process_group()


def pairs_of(ring: Ring) -> int:
    """Pairs of a query and a key that a rank computes, counted on the parts of its ring."""
    total = 0
    for owner in range(ring.sequence.size):
        part = ring.part(owner)
        queries, keys = (at.stop - at.start for at in (part.queries, part.keys))
        total += part.band.pairs(queries, keys)
    return total


def formula_bytes(args, ranks: int, shard: int) -> int:
    """As the docstring of `megalong.attention.dense` says, for rank 0."""
    wide, narrow = 4, torch.empty(0, dtype=getattr(torch, args.dtype)).element_size()
    heads, kv_heads, row = args.heads, args.kv_heads, args.head_dim
    half = -(-shard // 2) if ranks > 1 else 0
    swapped = narrow * row * half * ((heads + 2 * kv_heads) + heads + (3 * heads + 2 * kv_heads))
    swapped += wide * row * half * (heads + 2 * kv_heads) + 2 * wide * heads * half
    around = 2 * kv_heads * shard * row * (2 * narrow * (ranks - 1) + wide * ranks)
    return swapped + around


if __name__ == "__main__":
    main()
