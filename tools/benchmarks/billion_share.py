"""The process of one rank's share: what `billion.py` starts, asks and listens to."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from memory_measured import resident

from megalong.attention import DilatedPattern, operators
from megalong.attention.dilated import sequence_parallel_attention
from megalong.attention.exchange import SequenceGroup
from megalong.attention.sequence_parallel import shard_rows
from megalong.attention.sequence_plan import Shards, make_plan, pairs_of_rank, subgroup_sizes
from megalong.config.arguments import config_from_values
from megalong.dry_run.share import (
    Clock,
    SyntheticRows,
    answered,
    lone_rank,
    lone_sequence,
    numbered_batches,
    share,
)
from megalong.model.build import build_model
from megalong.parallel.traffic import CountTraffic
from megalong.training.engine import TrainingEngine
from megalong.utils.machine import use_gpu

# What the time of a run goes to: the functions of a backend, by what they attend to.
PARTS = {
    "forward": "within the shard",
    "backward": "within the shard",
    "attend_rows": "to other ranks' rows",
    "attend_rows_backward": "to other ranks' rows",
}
FILLED_IN = "filling in what others send"
PROCESSOR = "processor"  # not a part of the time, but another measure of it
SMALL = {"tokens": 2**15, "ranks": 2, "rank": 1, "branches": ((2048, 1), (2**15, 16))}
# Of gradients there are to be few at a time beside what is measured.
DEEPSPEED = {"zero_optimization": {"reduce_bucket_size": 100_000}}


@dataclass(frozen=True)
class Share:
    """run: returns its seconds, by what they went to, and PROCESSOR, those in which this process
    had a processor, fewer where others want it too. sequence, layers: of what is run. facts: what
    is known of it without running. filled_in: seconds that the other ranks' part has taken."""

    run: Callable[[], dict[str, float]]
    sequence: SequenceGroup
    layers: int
    facts: dict[str, Any]
    filled_in: Clock


def serve(end, part: str, case: dict[str, Any], settings: dict[str, Any]) -> None:
    """Send what is known after a first run, then the seconds of a run whenever one is asked for."""
    torch.set_num_threads(settings["threads"])
    make = {"attention": attention, "step": training_step}[part]
    with make(SMALL, settings) as share:
        share.run()
    del share
    before = memory_now()
    with make(case, settings) as share:
        groups = {"sequence": list(share.sequence.subgroups.values())}
        share.filled_in.waits = use_gpu()
        with CountTraffic(groups) as traffic, parts_of_time() as parts:
            seconds = share.run()
        share.filled_in.waits = False
        peak = memory_peak() - before
        parts[FILLED_IN] = share.filled_in.seconds
        whole = sum(spent for name, spent in seconds.items() if name != PROCESSOR)
        parts["everything else"] = whole - sum(parts.values())
        per_layer = {
            name: {what: count[what] // share.layers for what in ("calls", "bytes")}
            for name, count in traffic.counts.get("sequence", {}).items()
        }
        first = {"seconds": seconds, "parts": dict(parts)}
        row = {**case, **share.facts, "peak": peak, "per_layer": per_layer, "first": first}
        end.send({**row, "device": device_name(), "runs": []})
        while end.recv() == "run":
            end.send(share.run())


@contextlib.contextmanager
def attention(case: dict[str, Any], settings: dict[str, Any]) -> Iterator[Share]:
    """One layer's attention, forward and backward, of inputs that are drawn."""
    tokens, ranks, rank = (case[name] for name in ("tokens", "ranks", "rank"))
    heads, kv_heads = settings["heads"], settings["kv_heads"]
    head_dim, length = settings["hidden_size"] // heads, tokens // ranks
    dtype = torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    device = torch.device("cuda" if use_gpu() else "cpu")
    pattern = DilatedPattern(*zip(*case["branches"], strict=True))
    shards = Shards(rank, ranks, length)
    start = time.perf_counter()
    plan = make_plan(pattern, shards, heads, kv_heads, True)
    shard_rows(plan, heads, kv_heads, device)
    facts = {
        "plan_seconds": time.perf_counter() - start,
        "pairs": pairs_of_rank(pattern, shards, heads, kv_heads),
        "mean_pairs": pattern.attention_pairs(tokens, heads, kv_heads, causal=True) / ranks,
    }
    generator = torch.Generator().manual_seed(rank)
    q, k, v, grad = (
        torch.randn(1, length, number, head_dim, generator=generator).to(device, dtype)
        for number in (heads, kv_heads, kv_heads, heads)
    )
    for x in (q, k, v):
        x.requires_grad_()
    clock = Clock()
    with lone_rank(rank, ranks):
        sequence = lone_sequence(subgroup_sizes(pattern, length, ranks))

        def run() -> dict[str, float]:
            start, busy = now(), time.process_time()
            out = sequence_parallel_attention(q, k, v, pattern, sequence)
            between = now()
            torch.autograd.grad(out, (q, k, v), grad)
            seconds = {"forward": between - start, "backward": now() - between}
            return {**seconds, PROCESSOR: time.process_time() - busy}

        with answered(sequence, SyntheticRows(), clock):
            yield Share(run, sequence, 1, facts, clock)


@contextlib.contextmanager
def training_step(case: dict[str, Any], settings: dict[str, Any]) -> Iterator[Share]:
    """A step of the training's engine, with all layers."""
    ranks, layers = case["ranks"], settings["layers"]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        deepspeed = Path(folder, "deepspeed.json")
        deepspeed.write_text(json.dumps(DEEPSPEED))
        config = config_from_values(model(case, settings, deepspeed)).resolve(ranks)
        with share(config, case["rank"], ranks, SyntheticRows(), clock) as mesh:
            vocabulary = settings["vocab_size"]
            engine = TrainingEngine(build_model(config, vocabulary, mesh), config, mesh)
            batches = numbered_batches(config, vocabulary, mesh)
            facts = {"parameters": sum(x.numel() for x in engine.model.parameters())}

            def run() -> dict[str, float]:
                start, busy = now(), time.process_time()
                engine.train_step(batches, 1e-4)
                return {"step": now() - start, PROCESSOR: time.process_time() - busy}

            try:
                yield Share(run, mesh.sequence, layers, facts, clock)
            finally:
                engine.deepspeed.destroy()


def model(case: dict[str, Any], settings: dict[str, Any], deepspeed: Path) -> dict[str, Any]:
    """The configuration, as flags have it."""
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
        "deepspeed_config": str(deepspeed),
        "data_path": "unread",
        "tokenizer_type": "ByteTokenizer",
        **({} if use_gpu() else on_cpu),
    }


@contextlib.contextmanager
def parts_of_time() -> Iterator[Counter[str]]:
    """Inside, the seconds that the backend's functions take, by `PARTS`; a GPU is waited for."""
    parts: Counter[str] = Counter()

    def timed(function: Callable, part: str) -> Callable:
        def call(*arguments, **options):
            start = now()
            result = function(*arguments, **options)
            parts[part] += now() - start
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name, part in PARTS.items():
            function = timed(getattr(operators, name), part)
            stack.enter_context(mock.patch.object(operators, name, function))
        yield parts


def now() -> float:
    if use_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_now() -> int:
    """Bytes that the process has; the peak is measured from now on."""
    gc.collect()
    if use_gpu():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again
    return resident("VmRSS")


def memory_peak() -> int:
    return torch.cuda.max_memory_allocated() if use_gpu() else resident("VmHWM")


def device_name() -> str:
    return torch.cuda.get_device_name() if use_gpu() else "CPU"
