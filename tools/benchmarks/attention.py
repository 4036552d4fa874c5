"""Time, memory and arithmetic rate of one attention layer, each kind against dense, by length.

On a CPU, from the repository's root (about five minutes on two cores; --quick: half a minute):

    python tools/benchmarks/attention.py --output runs/attention-benchmark

On a GPU ("make gpu" does about this, after the tests that need a GPU):

    python tools/benchmarks/attention.py --device cuda --dtype bfloat16 --heads 16 \\
        --patterns A B L --head-dims 64 128 --kv-heads 16 4 2 --repeats 20 \\
        --lengths 2048 8192 32768 131072 1048576 --longest-dense 131072 --output runs/gpu

Patterns, with w0 = --first-segment-length, up to the length of the sequence:
    A   w = w0 * 4^k, r = 4^k      B   w = w0 * 4^k, r = 2^k
    L   the paper's: w = w0 * (1, 2, 4, 8, 16), r = (1, 2, 4, 6, 12), at every length
    local   a window of w0      sparse  blocks of w0, 32 columns of each     dense   all pairs
Contenders, all causal: see contenders.py. They take turns within each repeat, so that a slow moment
of the machine hits all of them. "forward" runs without autograd; "backward" is the backward pass
alone; "forward+backward" both. Medians are reported, with the least and the largest time. On a GPU
times lie between two events after its L2 cache was flushed.

With --documents 1 16 256, ours run also with so many documents, of random lengths, that share each
sequence and are kept apart. What the first call plans of a batch is left out, as all layers share
it.

TFLOP/s count useful work: 4 head_dim operations forward and 2.5 times as many backward for each
pair of a query and a key that the pattern offers, those between documents included (a dense
contender's pairs are all of the causal ones). The roofline is the longer of work / peak rate
and bytes / bandwidth, where every input is read and every result is written once; the share is that
time / the measured time.

Peak memory is of forward and backward, inputs included: on a GPU what PyTorch allocated, on a CPU
the growth of the resident memory of a fresh process (Linux). Writes attention.json, attention.txt
and attention.png into --output; the first two list how many times as fast as each baseline we are,
in each measure.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import torch
    from common import axes_of, resident, write
    from contenders import CONTENDERS, ON_CPU, contenders, documents_of

    from megalong.attention import DilatedPattern
    from megalong.attention.patterns import DensePattern, LocalPattern, SparsePattern
    from megalong.model.flops import peak_of_name

# Bytes/s of the memory, by a part of the device's name; the first that fits. From the data sheets
# of NVIDIA's A100 (2021), H100 (2023), H200 (2024) and HGX B200 (2025).
BANDWIDTH = {
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100": 1.555e12,
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
}


MEASURES = ("forward", "backward", "forward+backward")
# The first that was measured; the rest is baseline.
OURS = (
    "dilated (triton)", "dilated (sdpa)", "local (triton)", "local (sdpa)", "sparse (triton)",
    "sparse (sdpa)", "dense (ours)",
)  # fmt: skip

DOCUMENTS = ", documents: "  # in the name of a contender that keeps so many apart


class Setting(NamedTuple):
    """What is measured by sequence length."""

    pattern: str
    head_dim: int
    kv_heads: int


KINDS = ("local", "sparse", "dense")  # the other patterns are dilated
SPARSE_COLUMNS = 32


def main():
    args = parse_arguments()
    settings = [Setting(*x) for x in product(args.patterns, args.head_dims, args.kv_heads)]
    if args.measure_memory:
        print(resident_peak(args, settings[0], args.lengths[0], args.measure_memory))
        return
    results = []
    for setting, length in product(settings, args.lengths):
        for row in measure(args, setting, length):
            print(row_text(row), flush=True)
            results.append(row)
        save(args, results)  # each time: a run that is cut off leaves what it has
    print("\n".join(comparisons_text(comparisons(results))))
    if args.output:
        plot(results, args.output / "attention.png")
        print(f"wrote {args.output}/attention.json, attention.txt and attention.png")


def save(args, results: list[dict]):
    """Write attention.json and attention.txt, if there is a folder for them."""
    if not args.output:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    compared, about = comparisons(results), machine(args)
    hidden = ("output", "measure_memory", "known")
    flags = {k: v for k, v in vars(args).items() if k not in hidden}
    report = {"machine": about, "flags": flags, "results": results, "comparisons": compared}
    write(args.output / "attention.json", report)
    lines = [f"{about}", f"{flags}", "", *map(row_text, results), *comparisons_text(compared)]
    (args.output / "attention.txt").write_text("\n".join(lines) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lengths = [2048, 4096, 8192, 16384, 32768, 65536]
    add = parser.add_argument
    add("--patterns", nargs="+", default=["A"], choices=(*"ABL", *KINDS))
    add("--head-dims", type=int, nargs="+", default=[64])
    add("--heads", type=int, default=4)
    add("--kv-heads", type=int, nargs="+", help="default: as many as heads")
    add("--lengths", type=int, nargs="+", default=lengths, help="sequence lengths, in tokens")
    add("--longest-dense", type=int, default=32768, help="no quadratic one beyond this length")
    add("--flex-lengths", type=int, nargs="*", default=[], help="it compiles for each: only these")
    add("--batch", type=int, default=1)
    add("--first-segment-length", type=int, default=2048, help="w0 of the patterns")
    add("--documents", type=int, nargs="*", default=[], help="in a sequence, kept apart")
    add(
        "--contenders",
        nargs="+",
        choices=list(CONTENDERS),
        help="default: all that the device can run",
    )
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    add("--repeats", type=int, default=3, help="medians are over so many runs")
    add("--quick", action="store_true", help="short sequences and one run: to see that all works")
    add("--output", type=Path, help="folder for the results")
    add("--measure-memory", help=argparse.SUPPRESS)  # one child's only task: a contender
    args = parser.parse_args()
    args.known = contenders(args.documents)
    if args.quick:
        args.lengths, args.first_segment_length, args.repeats = [512], 128, 1
    args.kv_heads = args.kv_heads or [args.heads]
    args.contenders = args.contenders or list(CONTENDERS if on_gpu(args) else ON_CPU)
    apart = [x for x in args.known if documents_of(x) and x.partition(",")[0] in args.contenders]
    args.contenders += apart
    return args


def pattern_of(name: str, length: int, first: int):
    if name == "local":
        return LocalPattern(first)
    if name == "sparse":
        return SparsePattern(first, min(SPARSE_COLUMNS, first))
    if name == "dense":
        return DensePattern()
    if name == "L":
        widths = [first * factor for factor in (1, 2, 4, 8, 16)]
        return DilatedPattern(widths, (1, 2, 4, 6, 12))
    ladder = DilatedPattern.geometric(length, first, 4)
    if name == "A":
        return ladder
    return DilatedPattern(ladder.segment_lengths, [2**k for k in range(len(ladder.branches))])


# ------------------------------------------------------------------------------ measuring


def measure(args, setting: Setting, length: int) -> list[dict]:
    """One row for each contender at one length."""
    flush_cache(args)
    before = torch.cuda.memory_allocated() if on_gpu(args) else 0
    pattern, tensors = inputs(args, setting, length)
    names = [name for name in args.contenders if wanted(args, setting, name, length)]
    rows = {name: {**setting._asdict(), "length": length, "contender": name} for name in names}
    running = {}
    for name, row in rows.items():
        try:
            attention = args.known[name](pattern, *tensors[:2])
            warm_up(args, setting, name, attention, tensors)
            running[name] = attention
        except Exception as error:  # out of memory, not supported: that is a result, too
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:150]
    times = {name: [] for name in running}
    for _ in range(args.repeats):
        for name, attention in running.items():
            times[name].append(time_once(args, name, attention, *tensors))
    for name, attention in running.items():
        rows[name] |= rates(times[name], work(args, setting, length, name, pattern))
        if on_gpu(args):
            torch.cuda.reset_peak_memory_stats()
            time_once(args, name, attention, *tensors)
            peak = torch.cuda.max_memory_allocated() - before
        elif goes_backward(args, name):
            peak = peak_of_child(args, setting, length, name)
        else:
            continue
        rows[name]["peak_memory_bytes"] = peak
    return list(rows.values())


def rates(runs: list[dict], work: dict) -> dict:
    """Median and extreme times of each measure, and what they mean."""
    found = {}
    for kind in runs[0]:
        flops, floor = work[kind]
        times = [run[kind] for run in runs]
        seconds = statistics.median(times)
        found[kind] = {
            "seconds": seconds, "least": min(times), "largest": max(times),
            "teraflops": flops / seconds / 1e12, "share_of_roofline": floor and floor / seconds,
        }  # fmt: skip
    return found


def wanted(args, setting: Setting, name: str, length: int) -> bool:
    kind = setting.pattern if setting.pattern in KINDS else "dilated"
    if not name.startswith(kind) and not (name.startswith("dense") and "ours" not in name):
        return False
    if "flex" in name:
        return length in args.flex_lengths
    quadratic = name.startswith("dense") or "masked" in name
    return not quadratic or length <= args.longest_dense


def inputs(args, setting: Setting, length: int):
    """The pattern, and q, k, v and the gradient of the output."""
    generator = torch.Generator(args.device).manual_seed(0)
    heads = (args.heads, setting.kv_heads, setting.kv_heads, args.heads)
    tensors = [
        torch.randn(
            args.batch, length, h, setting.head_dim, generator=generator, device=args.device,
            dtype=getattr(torch, args.dtype), requires_grad=number < 3,
        )
        for number, h in enumerate(heads)
    ]  # fmt: skip
    return pattern_of(setting.pattern, length, args.first_segment_length), tensors


def warm_up(args, setting: Setting, name: str, attention, tensors):
    """Compile, choose algorithms, start threads; on a CPU, where runs take long, with less."""
    if not on_gpu(args) and "flex" not in name:
        pattern, tensors = inputs(args, setting, min(tensors[0].shape[1], 2048))
        attention = args.known[name](pattern, *tensors[:2])
    time_once(args, name, attention, *tensors)


def goes_backward(args, name: str) -> bool:
    return on_gpu(args) or "flex" not in name


def time_once(args, name: str, attention, q, k, v, grad) -> dict[str, float]:
    """Seconds of each of MEASURES that there is."""
    if not goes_backward(args, name):
        q, k, v = (x.detach() for x in (q, k, v))
    flush_cache(args)
    with torch.no_grad():
        marks = [mark(args)]
        attention(q, k, v)
        marks.append(mark(args))
    if not goes_backward(args, name):
        return {MEASURES[0]: marks[1] - marks[0]}
    flush_cache(args)
    marks.append(mark(args))
    out = attention(q, k, v)
    marks.append(mark(args))
    torch.autograd.grad(out, (q, k, v), grad)
    marks.append(mark(args))
    spans = zip(MEASURES, ((0, 1), (3, 4), (2, 4)), strict=True)
    if on_gpu(args):
        torch.cuda.synchronize()
        return {kind: marks[a].elapsed_time(marks[b]) / 1e3 for kind, (a, b) in spans}
    return {kind: marks[b] - marks[a] for kind, (a, b) in spans}


def mark(args):
    if not on_gpu(args):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def flush_cache(args):
    if on_gpu(args):
        larger_than_cache(args.device).zero_()


@cache
def larger_than_cache(device: str) -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device=device)


def on_gpu(args) -> bool:
    return args.device.startswith("cuda")


def work(args, setting: Setting, length: int, name: str, pattern) -> dict:
    """{measure: (useful FLOPs, least seconds on this device or None)}."""
    if name.startswith("dense"):
        pattern = DensePattern()
    heads = (args.heads, setting.kv_heads)
    pairs = pattern.attention_pairs(length, *heads, causal=True)
    forward = 4 * setting.head_dim * args.batch * pairs
    flops = {"forward": forward, "backward": 2.5 * forward, "forward+backward": 3.5 * forward}
    # Forward: q, k, v in, output and log-sum-exp out. Backward: these and the output's gradient in,
    # three gradients out.
    rows = args.batch * length * (args.heads + setting.kv_heads)
    item, lse = getattr(torch, args.dtype).itemsize, 4 * args.batch * length * args.heads
    forward_bytes = 2 * rows * setting.head_dim * item + lse
    backward_bytes = 4 * rows * setting.head_dim * item + lse
    moved = (forward_bytes, backward_bytes, forward_bytes + backward_bytes)
    peak = peaks(args)
    floors = [
        peak and max(flops[kind] / peak[0], count / peak[1])
        for kind, count in zip(MEASURES, moved, strict=True)
    ]
    return {kind: (flops[kind], floor) for kind, floor in zip(MEASURES, floors, strict=True)}


def peaks(args) -> tuple[float, float] | None:
    if not on_gpu(args) or args.dtype not in ("bfloat16", "float16"):
        return None
    name = torch.cuda.get_device_name()
    flops = peak_of_name(name, torch.bfloat16)
    bandwidth = next((speed for part, speed in BANDWIDTH.items() if part in name), None)
    return None if flops is None or bandwidth is None else (flops, bandwidth)


def peak_of_child(args, setting: Setting, length: int, name: str) -> int:
    """A fresh process measures itself: this one's memory has seen other contenders."""
    command = [sys.executable, __file__, "--measure-memory", name, "--lengths", str(length)]
    command += ["--patterns", setting.pattern, "--head-dims", str(setting.head_dim)]
    command += ["--kv-heads", str(setting.kv_heads), "--dtype", args.dtype]
    for field in ("batch", "heads", "first_segment_length"):
        command += [f"--{field.replace('_', '-')}", str(getattr(args, field))]
    if documents_of(name):
        command += ["--documents", str(documents_of(name))]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(result.stdout)


def resident_peak(args, setting: Setting, length: int, name: str) -> int:
    def run(length):
        pattern, tensors = inputs(args, setting, length)
        time_once(args, name, args.known[name](pattern, *tensors[:2]), *tensors)

    run(256)  # libraries loaded, threads started
    before = resident("VmRSS")
    run(length)
    return resident("VmHWM") - before


def machine(args) -> dict:
    return {
        "device": torch.cuda.get_device_name() if on_gpu(args) else cpu_name(),
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


def setting_of(row: dict) -> Setting:
    return Setting(*(row[field] for field in Setting._fields))


def row_text(row: dict) -> str:
    text = "{pattern} d{head_dim:<3} kv{kv_heads:<3} {length:>8}  {contender:<16}".format(**row)
    if "error" in row:
        return f"{text}  {row['error']}"
    for kind in (kind for kind in MEASURES if kind in row):
        found = row[kind]
        text += f"  {kind} {found['seconds'] * 1e3:9.3f} ms {found['teraflops']:7.3g} TFLOP/s"
        if found["share_of_roofline"]:
            text += f" {found['share_of_roofline']:4.0%}"
    if "peak_memory_bytes" in row:
        text += f"  peak {row['peak_memory_bytes'] / 2**20:7.0f} MiB"
    return text


def comparisons(results: list[dict]) -> list[dict]:
    """What we offer beside every baseline: settings, lengths, measures and times."""
    found, cases = [], {}
    for row in results:
        if "error" not in row:
            key = (*setting_of(row), row["length"])
            cases.setdefault(key, {})[row["contender"]] = row
    for case, kind in product(cases.values(), MEASURES):
        name = next((name for name in OURS if name in case), None)
        for baseline, row in case.items() if name else ():
            if baseline != name and kind in row and DOCUMENTS not in baseline:
                where = {**setting_of(row)._asdict(), "length": row["length"]}
                times = {"seconds": row[kind]["seconds"], "ours": case[name][kind]["seconds"]}
                found.append({**where, "measure": kind, "baseline": baseline, **times})
    return found


def comparisons_text(compared: list[dict]) -> list[str]:
    line = "{pattern} d{head_dim} kv{kv_heads} {length:>8}  {measure:<16}  {x:6.2f} x  {baseline}"
    text = [line.format(**row, x=row["seconds"] / row["ours"]) for row in compared]
    lost = sum(row["seconds"] < row["ours"] for row in compared)
    return ["", f"ours is so many times as fast ({lost} times a baseline is faster)", *text]


def plot(results: list[dict], path: Path):
    """Plot time, TFLOP/s and memory of forward and backward by length, a line for each setting."""
    both = MEASURES[2]
    figure, axes = axes_of(3, 6, 5)
    rows = [row for row in results if both in row]
    for key in dict.fromkeys((*setting_of(row), row["contender"]) for row in rows):
        mine = [row for row in rows if (*setting_of(row), row["contender"]) == key]
        values = (
            [row[both]["seconds"] for row in mine],
            [row[both]["teraflops"] for row in mine],
            [row["peak_memory_bytes"] / 2**20 for row in mine],
        )
        label = f"{key[0]} d{key[1]} kv{key[2]}: {key[3]}"
        for panel, numbers in zip(axes, values, strict=True):
            panel.plot([row["length"] for row in mine], numbers, "o-", label=label)
    for panel, name in zip(axes, ("seconds", "TFLOP/s", "peak MiB"), strict=True):
        panel.set(xlabel="sequence length (tokens)", ylabel=f"{both}: {name}", yscale="log")
        panel.set_xscale("log", base=2)
    axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
