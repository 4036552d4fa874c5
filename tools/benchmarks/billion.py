"""One rank's exact share of a sequence of a billion tokens: an attention layer, a training step.

    python tools/benchmarks/billion.py --tokens 2**30 --ranks 1024 --rank 517 --output runs/billion

One process is one rank of a launch of any size: its shard has the length that it would have, plan
and kernels are the program's own, and the training step is that of the training's engine. Only the
other ranks are not there: the rows that would come from them are made up, right in number and place
(megalong/dry_run/share.py). With their true rows the share is the slice of the whole, to rounding
(tests/dry_run/test_share.py). So what is measured is what this rank computes, holds and receives;
not how long the network takes, for which see communication.py.

The model is narrow by default, so that a CPU can have a million tokens a rank; a GPU takes a real
one: --layers 12 --hidden-size 768 --heads 12 --vocab-size 32000 --precision bf16. The pattern is
the default ladder up to the whole sequence: segments grow by --ratio and rates with them. With
--spanning-rows R the ladder ends with the shard, and one more branch spans the whole sequence, of
which each head keeps R rows.

Several --tokens with one --shard-length are measured taking turns, each in a process of its own:

    python tools/benchmarks/billion.py --tokens 2**20 2**25 2**30 --shard-length 2**16 --rank last

Writes billion.json, billion.md and billion.png into --output. On a machine that others use, look at
the processor's time: that of the process, with --threads 1 about what it would take alone. Memory
on a CPU is resident memory at the peak, less what the process had when a small share had been
through it; on a GPU what was allocated at the peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    from billion_report import total, write_report

    from megalong.attention.pattern import DilatedPattern
    from megalong.config.flags import whole_number
    from megalong.utils.machine import use_gpu

PLACES = ("first", "middle", "last")
# The C library gives freed memory back at once, as a GPU's allocator would give it to the next
# tensor.
CPU_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.update({"PYTHONWARNINGS": "ignore", **({} if use_gpu() else CPU_ENVIRONMENT)})
    measured = [measure(args, part, cases(args)) for part in args.parts]
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    report = {"settings": settings, **dict(zip(args.parts, measured, strict=True))}
    write_report(report, args.output)
    print(f"wrote {args.output}/billion.json, billion.md and billion.png")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=count, nargs="+", default=[2**30], help="of the sequence: 2**30, 1Gi, ...")
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument("--ranks", type=count, help="that share the sequence; default 1024")
    shards.add_argument("--shard-length", type=count, help="tokens of a rank, for any --tokens")
    add("--rank", nargs="+", default=["last"], help=f"a number, or {', '.join(PLACES)}")
    add("--parts", nargs="+", default=["attention", "step"], choices=("attention", "step"))
    add("--repeats", type=int, default=3, help="attention: medians are over so many runs")
    add("--step-repeats", type=int, default=0, help="further training steps after the first")
    add("--layers", type=int, default=2)
    add("--hidden-size", type=int, default=64)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, help="default: as many as heads")
    add("--ffn-hidden-size", type=int, help="default: 8/3 of the hidden size, in sixteens")
    add("--vocab-size", type=int, default=256)
    add("--first-segment", type=count, default=2048)
    add("--ratio", type=int, default=4, help="of a segment, and a rate, to the one before")
    add("--spanning-rows", type=count, help="see above")
    add("--precision", default="fp32", choices=("fp32", "bf16"))
    add("--memory-path", default="on", choices=("on", "off"))
    add("--threads", type=int, default=1, help="of each process on a CPU")
    add("--output", type=Path, default=Path("runs/billion"))
    args = parser.parse_args(arguments)
    args.kv_heads = args.kv_heads or args.heads
    args.ffn_hidden_size = args.ffn_hidden_size or -(-args.hidden_size * 8 // 3 // 16) * 16
    if args.shard_length is None and args.ranks is None:
        args.ranks = 1024
    for tokens in args.tokens:
        by = args.ranks or args.shard_length
        if tokens % by or tokens < 2 * by:
            flag = "--ranks" if args.ranks else "--shard-length"
            parser.error(f"--tokens {tokens} must be a multiple of {flag} {by}, at least twice it")
        for rank in args.rank:
            place_of(parser, rank, args.ranks or tokens // args.shard_length)
    if args.hidden_size % args.heads or args.heads % args.kv_heads:
        parser.error("--heads must divide --hidden-size, and be a multiple of --kv-heads")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def count(text: str) -> int:
    """Of tokens or ranks, as `whole_number` reads them; at least one."""
    if (value := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is none, such as 1048576, 2**20 or 1Mi")
    return value


def place_of(parser: argparse.ArgumentParser, rank: str, ranks: int) -> int:
    """The number of a rank that --rank names."""
    places = {"first": 0, "middle": ranks // 2, "last": ranks - 1}
    number = places.get(rank, int(rank) if rank.isdecimal() else -1)
    if not 0 <= number < ranks:
        parser.error(f"--rank {rank}: {', '.join(PLACES)}, or from 0 to {ranks - 1} is expected")
    return number


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured: tokens, ranks, rank and the branches of the pattern."""
    parser = argparse.ArgumentParser()
    found = []
    for tokens in args.tokens:
        ranks = args.ranks or tokens // args.shard_length
        pattern = pattern_for(args, tokens, tokens // ranks)
        for rank in args.rank:
            number = place_of(parser, rank, ranks)
            case = {"tokens": tokens, "ranks": ranks, "rank": number}
            found.append({**case, "branches": pattern.branches})
    return found


def pattern_for(args: argparse.Namespace, tokens: int, shard: int) -> DilatedPattern:
    first, ratio, rows = args.first_segment, args.ratio, args.spanning_rows
    if rows is None:
        return DilatedPattern.geometric(tokens, first, ratio)
    lengths, rates = [first], [1]
    while lengths[-1] * ratio <= shard:
        lengths.append(lengths[-1] * ratio)
        rates.append(rates[-1] * ratio)
    return DilatedPattern((*lengths, tokens), (*rates, max(1, tokens // rows)))


def measure(args: argparse.Namespace, part: str, cases: list[dict]) -> list[dict[str, Any]]:
    """Rows of results. Each case has a process; they run one at a time, taking turns."""
    context = multiprocessing.get_context("spawn")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    rows, ends = [], []
    for case in cases:
        print(f"{part}: {words(case)} ...", flush=True)
        end, other = context.Pipe()
        process = context.Process(target=share, args=(other, part, case, settings), daemon=True)
        process.start()
        other.close()
        rows.append(received(end, part, case))
        ends.append((end, process))
        print(f"    {described(rows[-1])}", flush=True)
    for _ in range(args.repeats if part == "attention" else args.step_repeats):
        for row, (end, _) in zip(rows, ends, strict=True):
            end.send("run")
            row["runs"].append(received(end, part, row))
    for row, (end, process) in zip(rows, ends, strict=True):
        end.send("end")
        process.join()
        runs = row["runs"] or [row["first"]["seconds"]]
        row["seconds"] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"{part}: {words(row)}: {seconds_of(row)}", flush=True)
    return rows


def share(*arguments) -> None:
    """What such a process does. It imports much that this one has no use for."""
    from billion_share import serve

    serve(*arguments)


def received(end, part: str, case: dict) -> dict[str, Any]:
    try:
        return end.recv()
    except EOFError:
        sys.exit(f"the process of the {part} of {words(case)} has failed; what it said is above")


def words(case: dict) -> str:
    return f"rank {case['rank']:,} of {case['ranks']:,}, {case['tokens']:,} tokens"


def described(row: dict) -> str:
    received = sum(count["bytes"] for count in row["per_layer"].values())
    return (
        f"{row['peak'] / 2**20:,.0f} MiB at the peak, {received:,} bytes a layer,"
        f" first run {total(row['first']['seconds']):.1f} s"
    )


def seconds_of(row: dict) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in row["seconds"].items())


if __name__ == "__main__":
    main()
