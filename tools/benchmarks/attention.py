"""Time and memory of one attention layer: dilated against dense, by sequence length.

On a CPU, from the repository's root (about five minutes on two cores):

    python tools/benchmarks/attention.py --output runs/attention-benchmark

In a minute: --lengths 2048 8192 --repeats 1. On a GPU:

    python tools/benchmarks/attention.py --device cuda --dtype bfloat16 --heads 16 --head-dim 128 \\
        --lengths 2048 8192 32768 131072 524288 --longest-dense 131072 --output runs/gpu

("make gpu" does this for head_dim 64 and 128, after the tests that need a GPU.)

The contenders take turns within each repeat, so that a slow moment of the machine hits all of
them, and medians are reported. "forward" runs without autograd; "forward+backward" includes both.
Peak memory is of forward and backward, inputs included: on a GPU what PyTorch allocated, on a CPU
the growth of the resident memory of a fresh process (Linux). Attention is causal; the pattern is
DilatedPattern.geometric for each length. Writes attention.json and attention.png into --output.

To add a contender, give it a line in CONTENDERS.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalong.attention import DilatedPattern, dense_attention, dilated_attention, sdpa

# Name -> function of a pattern that returns attention(q, k, v), all (batch, sequence, heads,
# head_dim). A new backend or a rival implementation is one more line.
CONTENDERS = {
    "dense": lambda pattern: dense_attention,
    "dense (cuDNN)": lambda pattern: cudnn_attention,
    "dilated (gather)": lambda pattern: partial(gathered_attention, pattern=pattern),
    "dilated (sdpa)": lambda pattern: partial(dilated_attention, pattern=pattern, backend="sdpa"),
    "dilated (triton)": lambda pattern: partial(
        dilated_attention, pattern=pattern, backend="triton"
    ),
}
QUADRATIC = {"dense", "dense (cuDNN)"}  # skipped beyond --longest-dense
ON_CPU = ["dense", "dilated (sdpa)"]  # the default there; the others are measured on a GPU
MEASURES = ("forward", "forward+backward")


def cudnn_attention(q, k, v):
    """Dense causal attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return dense_attention(q, k, v)


def gathered_attention(q, k, v, pattern):
    """How dilated attention is usually written: copy the rows of a branch, attend, scatter, mix.

    As in torchscale, the mixing weights carry no gradient. Causal; the segment lengths must be
    multiples of the rates and divide the sequence, as those of a geometric ladder of powers do.
    """
    batch, length, heads, head_dim = q.shape
    offsets = torch.tensor(pattern.offsets(heads, k.shape[2]), device=q.device)
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    every_head = torch.arange(heads, device=q.device)
    outs, lses = [], []
    for (width, rate), offset in zip(pattern.branches, offsets, strict=True):
        shape = (batch, length // width, width // rate, rate, heads)
        rows = (slice(None), slice(None), slice(None), offset, every_head)
        folded = [x.view(*shape, head_dim)[rows].flatten(0, 1).transpose(1, 2) for x in (q, k, v)]
        out, lse = sdpa.attend(*folded, True, head_dim**-0.5)
        full_out = out.new_zeros(*shape, head_dim)
        full_out[rows] = out.transpose(1, 2).unflatten(0, shape[:2])
        full_lse = lse.new_full(shape, -torch.inf)
        full_lse[rows] = lse.detach().transpose(1, 2).unflatten(0, shape[:2])
        outs.append(full_out.view(q.shape))
        lses.append(full_lse.view(q.shape[:3]))
    weights = torch.stack(lses).softmax(0).to(q.dtype)
    return sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))


def main():
    args = parse_arguments()
    if args.measure_memory:
        print(peak_memory(args, args.measure_memory, args.lengths[0]))
        return
    results = [row for length in args.lengths for row in measure(args, length)]
    for length in args.lengths:
        print_ratios(length, [row for row in results if row["length"] == length])
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(args), "settings": settings(args), "results": results}
        (args.output / "attention.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(results, args, args.output / "attention.png")
        print(f"wrote {args.output}/attention.json and attention.png")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=lengths, help="sequence lengths, in tokens")
    add("--longest-dense", type=int, default=32768, help="no dense attention beyond this length")
    add("--batch", type=int, default=1)
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, help="default: as many as heads")
    add("--head-dim", type=int, default=64)
    add("--first-segment-length", type=int, default=2048, help="of the pattern's ladder")
    add("--ratio", type=int, default=4, help="of the pattern's ladder")
    add("--contenders", nargs="+", choices=CONTENDERS, help="default: all that the device can run")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    add("--repeats", type=int, default=3, help="medians are over so many runs")
    add("--output", type=Path, help="folder for attention.json and attention.png")
    add("--measure-memory", choices=CONTENDERS, help=argparse.SUPPRESS)  # one child's only task
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    args.contenders = args.contenders or (ON_CPU if args.device == "cpu" else list(CONTENDERS))
    return args


def measure(args, length: int) -> list[dict]:
    """One row for each contender at one length."""
    names = [n for n in args.contenders if length <= args.longest_dense or n not in QUADRATIC]
    seconds = {name: {measure: [] for measure in MEASURES} for name in names}
    for name in names:  # warm up, on less where the run itself takes seconds
        time_once(args, name, min(length, 4096), MEASURES[1])
    for _ in range(args.repeats):
        for name in names:
            for kind in MEASURES:
                seconds[name][kind].append(time_once(args, name, length, kind))
    rows = []
    for name in names:
        row = {"contender": name, "length": length}
        row |= {f"{kind}_seconds": statistics.median(seconds[name][kind]) for kind in MEASURES}
        row |= {f"{kind}_runs": seconds[name][kind] for kind in MEASURES}
        row["peak_memory_bytes"] = memory_of(args, name, length)
        rows.append(row)
        print(
            f"{length:>8} tokens  {name:<16}"
            + "".join(f"  {kind} {row[f'{kind}_seconds'] * 1e3:9.1f} ms" for kind in MEASURES)
            + f"  peak {row['peak_memory_bytes'] / 2**20:8.0f} MiB",
            flush=True,
        )
    return rows


def time_once(args, name: str, length: int, kind: str) -> float:
    attention, q, k, v = setting(args, name, length, requires_grad=kind == MEASURES[1])
    synchronize(args)
    start = time.perf_counter()
    with torch.set_grad_enabled(kind == MEASURES[1]):
        out = attention(q, k, v)
        if kind == MEASURES[1]:
            out.backward(q.detach())
    synchronize(args)
    return time.perf_counter() - start


def setting(args, name: str, length: int, requires_grad: bool):
    """A contender's function and random inputs for it."""
    pattern = DilatedPattern.geometric(length, args.first_segment_length, args.ratio)
    generator = torch.Generator(args.device).manual_seed(0)
    tensors = [
        torch.randn(
            args.batch, length, heads, args.head_dim, generator=generator, device=args.device,
            dtype=getattr(torch, args.dtype), requires_grad=requires_grad,
        )
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]  # fmt: skip
    return CONTENDERS[name](pattern), *tensors


def synchronize(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def memory_of(args, name: str, length: int) -> int:
    """Peak bytes of one forward and backward; on a CPU a fresh process measures itself."""
    if args.device.startswith("cuda"):
        return peak_memory(args, name, length)
    command = [sys.executable, __file__, "--measure-memory", name, "--lengths", str(length)]
    for field in ("batch", "heads", "kv_heads", "head_dim", "first_segment_length", "ratio"):
        command += [f"--{field.replace('_', '-')}", str(getattr(args, field))]
    command += ["--dtype", args.dtype]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(result.stdout)


def peak_memory(args, name: str, length: int) -> int:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        time_once(args, name, length, MEASURES[1])
        return torch.cuda.max_memory_allocated() - before
    time_once(args, name, 256, MEASURES[1])  # libraries loaded, threads started
    before = resident_bytes("VmRSS")
    time_once(args, name, length, MEASURES[1])
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM), in bytes.

    getrusage would not do: its peak is inherited from the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", status)[1])


def print_ratios(length: int, rows: list[dict]):
    """How many times faster than the first contender the others are."""
    base, *others = rows
    for row in others:
        ratios = [base[f"{kind}_seconds"] / row[f"{kind}_seconds"] for kind in MEASURES]
        print(
            f"{length:>8} tokens  {row['contender']} is "
            + ", ".join(f"{r:.1f}x ({kind})" for r, kind in zip(ratios, MEASURES, strict=True))
            + f" as fast as {base['contender']}"
        )


def machine(args) -> dict:
    cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def settings(args) -> dict:
    return {k: v for k, v in vars(args).items() if k not in ("output", "measure_memory")}


def plot(results: list[dict], args, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = [(f"{kind}_seconds", kind, "seconds", 1) for kind in MEASURES]
    panels.append(("peak_memory_bytes", "peak memory, forward+backward", "MiB", 2**20))
    for axis, (field, title, unit, divisor) in zip(axes, panels, strict=True):
        for name in args.contenders:
            rows = [row for row in results if row["contender"] == name]
            lengths = [row["length"] for row in rows]
            axis.plot(lengths, [row[field] / divisor for row in rows], "o-", label=name)
        axis.set(title=title, xlabel="sequence length (tokens)", ylabel=unit)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"{machine(args)['device']}, {args.dtype}, {args.heads} heads of {args.head_dim}, "
        f"ladder {args.first_segment_length} x {args.ratio}^k, causal"
    )
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
