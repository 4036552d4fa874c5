"""One rank's exact share of a sequence of a billion tokens: an attention layer, a training step.

    python tools/benchmarks/share.py --tokens 2**30 --ranks 1024 --rank 517 --output runs/share

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
which each head keeps R rows. Several --tokens may have one --shard-length instead of --ranks.

Each case has a process of its own. Writes share.json, share.md and share.png into --output. On a
machine that others use, look at the processor's time: that of the process, with --threads 1 about
what it would take alone. Memory on a CPU is resident memory at the peak, less what the process had
when a small share had been through it; on a GPU what was allocated at the peak.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import torch
    from common import CPU_MEMORY, DEEPSPEED, axes_of, resident, write

    from megalong.attention import DilatedPattern
    from megalong.config.flags import whole_number
    from megalong.utils.machine import use_gpu

PLACES = ("first", "middle", "last")
PROCESSOR = "processor"  # not a part of the time, but another measure of it
SMALL = {"tokens": 2**15, "ranks": 2, "rank": 1, "branches": ((2048, 1), (2**15, 16))}
Run = Callable[[], dict[str, float]]  # returns seconds, by what they went to


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.update({"PYTHONWARNINGS": "ignore", **({} if use_gpu() else CPU_MEMORY)})
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    rows, spawn = [], multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for part in args.parts:
            for case in cases(args):
                rows.append(processes.submit(measure, part, case, settings).result())
                print(line_of(rows[-1]), flush=True)
                write(args.output / "share.json", {"settings": settings, "rows": rows})
    header = ("", "tokens", "ranks", "rank", "seconds", "processor, s", "MiB", "bytes a layer")
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *map(line_of, rows)]
    (args.output / "share.md").write_text("\n".join(lines) + "\n")
    plot(rows, args.output / "share.png")
    print(f"wrote {args.output}/share.json, share.md and share.png")


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
    add("--output", type=Path, default=Path("runs/share"))
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
        ranks = args.ranks or tokens // args.shard_length
        for rank in args.rank:
            if not 0 <= place_of(rank, ranks) < ranks:
                choices = f"{', '.join(PLACES)}, or from 0 to {ranks - 1}"
                parser.error(f"--rank {rank}: {choices} is expected")
    if args.hidden_size % args.heads or args.heads % args.kv_heads:
        parser.error("--heads must divide --hidden-size, and be a multiple of --kv-heads")
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    return args


def count(text: str) -> int:
    """Return a number of tokens or ranks, as `whole_number` reads them; at least one."""
    if (value := whole_number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is none, such as 1048576, 2**20 or 1Mi")
    return value


def place_of(rank: str, ranks: int) -> int:
    """Return the number of the rank that --rank names, -1 where it names none."""
    places = {"first": 0, "middle": ranks // 2, "last": ranks - 1}
    return places.get(rank, int(rank) if rank.isdecimal() else -1)


def cases(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what is measured: tokens, ranks, rank and the branches of the pattern."""
    found = []
    for tokens in args.tokens:
        ranks = args.ranks or tokens // args.shard_length
        branches = pattern_for(args, tokens, tokens // ranks).branches
        for rank in args.rank:
            case = {"tokens": tokens, "ranks": ranks, "rank": place_of(rank, ranks)}
            found.append({**case, "branches": branches})
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


# ------------------------------------------------------------------------------ in a process


def measure(part: str, case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a row: seconds (medians), bytes at the peak and by collective, of one case."""
    from megalong.parallel.traffic import CountTraffic

    torch.set_num_threads(settings["threads"])
    make = {"attention": attention, "step": training_step}[part]
    repeats = settings["repeats" if part == "attention" else "step_repeats"]
    layers = 1 if part == "attention" else settings["layers"]
    with make(SMALL, settings) as (run, _):
        run()
    del run
    before = memory_now()
    with make(case, settings) as (run, sequence):
        with CountTraffic({"sequence": list(sequence.subgroups.values())}) as traffic:
            first = run()
        peak = (torch.cuda.max_memory_allocated() if use_gpu() else resident("VmHWM")) - before
        runs = [run() for _ in range(repeats)]
    per_layer = {
        name: {what: found[what] // layers for what in ("calls", "bytes")}
        for name, found in traffic.counts.get("sequence", {}).items()
    }
    medians = {name: statistics.median(r[name] for r in runs or [first]) for name in first}
    row = {"part": part, **case, "peak": peak, "per_layer": per_layer, "seconds": medians}
    return {**row, "first": first, "runs": runs}


@contextlib.contextmanager
def attention(case: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[Run, Any]]:
    """One layer's attention, forward and backward, of inputs that are drawn."""
    from megalong.attention.dilated import sequence_parallel_attention
    from megalong.attention.sequence_plan import subgroup_sizes
    from megalong.dry_run.share import Clock, SyntheticRows, answered, lone_rank, lone_sequence

    ranks, rank = case["ranks"], case["rank"]
    heads, kv_heads = settings["heads"], settings["kv_heads"]
    length = case["tokens"] // ranks
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    device = torch.device("cuda" if use_gpu() else "cpu")
    pattern = DilatedPattern(*zip(*case["branches"], strict=True))
    generator = torch.Generator().manual_seed(rank)
    q, k, v, grad = (
        torch.randn(1, length, n, settings["hidden_size"] // heads, generator=generator).to(
            device, dtype
        )
        for n in (heads, kv_heads, kv_heads, heads)
    )
    for x in (q, k, v):
        x.requires_grad_()
    with lone_rank(rank, ranks):
        sequence = lone_sequence(subgroup_sizes(pattern, length, ranks))

        def run() -> dict[str, float]:
            start, busy = now(), time.process_time()
            out = sequence_parallel_attention(q, k, v, pattern, sequence)
            between = now()
            torch.autograd.grad(out, (q, k, v), grad)
            seconds = {"forward": between - start, "backward": now() - between}
            return {**seconds, PROCESSOR: time.process_time() - busy}

        with answered(sequence, SyntheticRows(), Clock()):
            yield run, sequence


@contextlib.contextmanager
def training_step(case: dict[str, Any], settings: dict[str, Any]) -> Iterator[tuple[Run, Any]]:
    """A step of the training's engine, with all layers."""
    from megalong.config.arguments import config_from_values
    from megalong.dry_run.share import Clock, SyntheticRows, numbered_batches, share
    from megalong.model.build import build_model
    from megalong.training.engine import TrainingEngine

    with tempfile.TemporaryDirectory() as folder:
        deepspeed = Path(folder, "deepspeed.json")
        deepspeed.write_text(json.dumps(DEEPSPEED))
        values = model(case, settings) | {"deepspeed_config": str(deepspeed)}
        config = config_from_values(values).resolve(case["ranks"])
        with share(config, case["rank"], case["ranks"], SyntheticRows(), Clock()) as mesh:
            vocabulary = settings["vocab_size"]
            engine = TrainingEngine(build_model(config, vocabulary, mesh), config, mesh)
            batches = numbered_batches(config, vocabulary, mesh)

            def run() -> dict[str, float]:
                start, busy = now(), time.process_time()
                engine.train_step(batches, 1e-4)
                return {"step": now() - start, PROCESSOR: time.process_time() - busy}

            try:
                yield run, mesh.sequence
            finally:
                engine.deepspeed.destroy()


def model(case: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration, as flags have it."""
    lengths, rates = zip(*case["branches"], strict=True)
    on_cpu = {"offload_activations": False, "attention_backend": "sdpa", "tile_size": 4096}
    return {
        "num_layers": settings["layers"],
        "hidden_size": settings["hidden_size"],
        "num_attention_heads": settings["heads"],
        "num_query_groups": settings["kv_heads"],
        "ffn_hidden_size": settings["ffn_hidden_size"],
        "make_vocab_size_divisible_by": 1,
        "seq_length": case["tokens"],
        "sequence_parallel_size": case["ranks"],
        "segment_lengths": lengths,
        "dilation_rates": rates,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "precision": settings["precision"],
        "memory_path": settings["memory_path"],
        "data_path": "unread",
        "tokenizer_type": "ByteTokenizer",
        **({} if use_gpu() else on_cpu),
    }


def now() -> float:
    if use_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_now() -> int:
    """Return the bytes that the process has; the peak is measured from now on."""
    gc.collect()
    if use_gpu():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again
    return resident("VmRSS")


# ------------------------------------------------------------------------------ results


def total(seconds: dict[str, float]) -> float:
    return sum(value for name, value in seconds.items() if name != PROCESSOR)


def received(row: dict[str, Any]) -> int:
    return sum(found["bytes"] for found in row["per_layer"].values())


def line_of(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    return (
        f"| {row['part']} | {row['tokens']:,} | {row['ranks']:,} | {row['rank']:,} |"
        f" {total(seconds):.3f} | {seconds[PROCESSOR]:.3f} | {row['peak'] / 2**20:,.0f} |"
        f" {received(row):,} |"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time, memory and bytes by the length of the sequence."""
    figure, axes = axes_of(3, 4)
    values = (
        ("seconds", lambda row: total(row["seconds"])),
        ("MiB at the peak", lambda row: row["peak"] / 2**20),
        ("MB received a layer", lambda row: received(row) / 1e6),
    )
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [row for row in rows if row["part"] == part]
        for panel, (label, value) in zip(axes, values, strict=True):
            panel.plot([row["tokens"] for row in mine], [*map(value, mine)], "o-", label=part)
            panel.set(ylabel=label, xlabel="tokens in the sequence", xscale="log", ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
