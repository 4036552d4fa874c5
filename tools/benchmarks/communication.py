"""Bytes and time of sharded attention, while ranks and sequence grow together.

On this machine, with gloo (two minutes):

    python tools/benchmarks/communication.py --output runs/communication

With NCCL, on as many GPUs as there are: --device cuda --ranks 2 4 8 --shard-length 131072.

Every rank keeps a shard of the same length, and the sequence is as long as the ranks make it. The
pattern has local branches, one over two ranks and one over all ranks, its dilation rate growing
with its segment, so that segment length / dilation rate is the same everywhere: the paper's case
(LongNet, arXiv 2307.02486, section 3.1), for which the traffic of a rank does not grow.

Measured for each number of ranks, as rank 0 sees it: bytes by collective of one layer, forward and
backward, beside what `gathered_rows` says they are; medians of the time of one layer, and of the
same with the local branches alone. Writes communication.json and
communication.png into --output.
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
    from common import axes_of, is_rank, join, measured_on, write

    from megalong.attention import DilatedPattern
    from megalong.attention.dilated import sequence_parallel_attention
    from megalong.attention.exchange import SequenceGroup
    from megalong.attention.sequence_plan import (
        Shards,
        gathered_rows,
        subgroup_sizes,
    )
    from megalong.parallel.traffic import CountTraffic

COLLECTIVES = ("all_gather", "reduce_scatter", "all_to_all")


def main() -> None:
    args = parse_arguments()
    if is_rank():
        measure_as_rank(args)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    measured = []
    for ranks in args.ranks:
        row = measured_on(ranks, args.output)
        measured.append(row)
        print(
            f"{ranks:3d} ranks, {row['sequence_length']:,} tokens: {row['bytes']:,} bytes a layer"
            f" and rank (formula: {row['formula_bytes']:,}), {row['seconds']:.3f} s a layer,"
            f" {row['local_seconds']:.3f} s of it local"
        )
    report = {"settings": settings(args), "measured": measured}
    write(args.output / "communication.json", report)
    plot(report, args.output / "communication.png")
    print(f"wrote {args.output}/communication.json and communication.png")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 4, 8, 16], help="processes to measure with")
    add("--shard-length", type=int, default=2048, help="tokens a rank holds")
    add("--segment-rows", type=int, default=512, help="segment length / dilation rate")
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, default=2)
    add("--head-dim", type=int, default=64)
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--repeats", type=int, default=5, help="medians are over so many runs")
    add("--output", type=Path, default=Path("runs/communication"))
    return parser.parse_args()


def settings(args) -> dict:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }


def pattern_for(shard_length: int, rows: int, ranks: int) -> DilatedPattern:
    """Local branches, one over two ranks, one over all: w / r is `rows` in each."""
    widths = rows, shard_length, 2 * shard_length, ranks * shard_length
    return DilatedPattern(widths, tuple(width // rows for width in widths))


def measure_as_rank(args) -> None:
    device = join(args.device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shard, dtype = args.shard_length, getattr(torch, args.dtype)
    pattern = pattern_for(shard, args.segment_rows, ranks)
    sequence = SequenceGroup.create(dist.group.WORLD, subgroup_sizes(pattern, shard, ranks))
    q, k, v = (
        torch.randn(1, shard, heads, args.head_dim, device=device, dtype=dtype).requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    local = [branch for branch in pattern.branches if branch[0] <= shard]
    local_pattern = DilatedPattern(*map(tuple, zip(*local, strict=True)))

    def layer(chosen: DilatedPattern) -> float:
        dist.barrier()
        start = time.perf_counter()
        out = sequence_parallel_attention(q, k, v, chosen, sequence)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        if args.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - start

    layer(pattern)  # warm up
    with CountTraffic({}) as counter:
        layer(pattern)
    seconds = [(layer(pattern), layer(local_pattern)) for _ in range(args.repeats)]
    counts = counter.counts.get("other", {})
    rows = gathered_rows(pattern, Shards(rank, ranks, shard), args.heads, args.kv_heads)
    numbers = rows * 2 * args.head_dim
    # forward in the tensors' dtype, gradients in float32
    formula = numbers * (torch.empty(0, dtype=dtype).element_size() + 4)
    by_collective = {name: counts[name] for name in COLLECTIVES if name in counts}
    whole, alone = (statistics.median(column) for column in zip(*seconds, strict=True))
    row = {
        "ranks": ranks,
        "sequence_length": ranks * shard,
        "branches": pattern.branches,
        "bytes": sum(count["bytes"] for count in by_collective.values()),
        "formula_bytes": formula,
        "by_collective": by_collective,
        "seconds": whole,
        "local_seconds": alone,
    }
    if rank == 0:
        args.output.write_text(json.dumps(row))
    dist.destroy_process_group()


def plot(report: dict, path: Path) -> None:
    measured = report["measured"]
    figure, (left, right) = axes_of(2, 5)
    ranks = [row["ranks"] for row in measured]
    left.plot(ranks, [row["bytes"] / 2**20 for row in measured], "o", label="counted")
    left.plot(ranks, [row["formula_bytes"] / 2**20 for row in measured], "-", label="formula")
    left.set(title="Traffic of a rank, one layer", ylabel="MiB, forward and backward")
    left.set_ylim(bottom=0)
    right.plot(ranks, [row["seconds"] for row in measured], "o-", label="whole layer")
    right.plot(ranks, [row["local_seconds"] for row in measured], "o--", label="local branches")
    right.set(title="Time of a layer", ylabel="seconds (processes share the cores)")
    for axes in (left, right):
        axes.set(xlabel="ranks; the sequence grows with them", xscale="log", xticks=ranks)
        axes.set_xticklabels([str(count) for count in ranks])
        axes.minorticks_off()
        axes.legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
