"""Training on one device: 20 steps of a 125M model, low precision against float32, the kernels of
the sequence axis by themselves, and steps of a million tokens.

On a GPU ("make gpu" does this, after tests and kernels; about 4.5 minutes):

    python tools/benchmarks/training.py --output runs/gpu/training

On a CPU, to see that it works (a quarter of a minute):

    python tools/benchmarks/training.py --device cpu --tiny --output runs/training-benchmark

Parts, each of which may fail alone:
    train      pretrain_longnet.py at its paper's smallest shape (12 layers, hidden size 768, 32,000
               rows of vocabulary, 32,768 tokens, bf16): tokens/s, MFU and peak memory of the last
               steps, as the run's own metrics have them.
    precision  the first steps of a small model in bf16, and on a GPU in fp32 too, against float32
               on the CPU: the largest difference of a step's loss, and the bound it has to keep.
    rows       rank 7 of 8 of a sequence, with the collectives left out: the time of its attention,
               forward and backward, and of the same tokens on one device; and the kernels that
               attend to other ranks' rows against the definition, with the bound of the error.
    long       three steps of that model at 1,048,576 tokens with `--memory-path on`: of the last
               tokens/s, MFU, and the utilisation by all FLOPs that are executed; peak memory of the
               device and pinned memory of the host, beside what a dry run says of both.
Data are Python's own sources, a token a byte, made on the spot. Writes training.json into --output,
after each part, and training.png where matplotlib is installed. Ends with status 1 where a part
failed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import SHAPES, VOCABULARY, axes_of, flags, in_process, write

from megalong.utils.command_line import REPOSITORY, ArgumentParser, run

MODEL_125M = (
    f"{flags(SHAPES['125M'])} --seq-length 32768"
    " --segment-lengths 2048 4096 8192 16384 32768 --dilation-rates 1 2 4 6 12"
    " --make-vocab-size-divisible-by 32000 --micro-batch-size 1 --global-batch-size 1"
    " --train-iters 20 --lr 6e-4 --lr-warmup-iters 5 --log-interval 5"
)
MODEL_SMALL = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 2 --seq-length 512"
    " --segment-lengths 128 256 512 --dilation-rates 1 2 4"
    " --micro-batch-size 2 --global-batch-size 2 --lr 1e-3 --lr-warmup-iters 2 --log-interval 1"
)
# Of a step's loss, in nats, over the steps of "precision". Rounding to bf16 moved it by 0.002 on a
# CPU; a wrong kernel or a lost gradient moves it by tenths.
BOUNDS = {"fp32": 1e-3, "bf16": 3e-2}
ROWS_BOUND = {"float32": 3e-5, "bfloat16": 2e-2}  # relative error of attend_rows, by dtype


def main() -> int:
    arguments = parse_arguments()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # a checkpoint of 125M parameters is no result
        return measure(arguments, output, Path(scratch))


def measure(arguments: Namespace, output: Path, scratch: Path) -> int:
    results: dict[str, object] = {"device": device_name(arguments.device), "tiny": arguments.tiny}
    failed = []
    for part in arguments.parts:
        print(f"== {part}", flush=True)
        start = time.perf_counter()
        try:
            results[part] = PARTS[part](arguments, scratch)
        except Exception as error:
            failed.append(part)
            results[part] = {"error": f"{type(error).__name__}: {error}"}
        results[part]["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(results[part]), flush=True)
        write(output / "training.json", results)
    plot(results, output / "training.png")
    return 1 if failed else 0


def parse_arguments() -> Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("--output", required=True, help="folder for the results and the runs")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="two steps of a small model each")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    return parser.parse_args()


def train(arguments: Namespace, scratch: Path) -> dict[str, object]:
    model = MODEL_SMALL if arguments.tiny else MODEL_125M
    steps = "--train-iters 2" if arguments.tiny else ""
    records = training_run(arguments, scratch, "train", f"{model} {steps} --precision bf16")
    last = records[-1]
    names = ("tokens_per_second", "mfu", "mfu_dense_equivalent")
    peaks = ("peak_memory_bytes", "peak_reserved_bytes")  # of the records' intervals
    return {
        "flags": model,
        "losses": [record["loss"] for record in records],
        **{name: last[name] for name in names},
        **{name: max(r[name] for r in records) for name in peaks if name in last},
    }


def precision(arguments: Namespace, scratch: Path) -> dict[str, object]:
    steps = 2 if arguments.tiny else 10
    model = f"{MODEL_SMALL} --train-iters {steps}"
    on_cpu = Namespace(device="cpu", tiny=arguments.tiny)
    corpus(scratch, arguments.tiny)  # before two processes want it
    kinds = ("bf16",) if arguments.device == "cpu" else ("fp32", "bf16")
    with ThreadPoolExecutor(1) as other:
        words = f"{model} --precision fp32"
        reference = other.submit(training_run, on_cpu, scratch, "fp32-cpu", words)
        runs = {
            kind: training_run(arguments, scratch, kind, f"{model} --precision {kind}")
            for kind in kinds
        }
        wanted = losses(reference.result())
    result: dict[str, object] = {"fp32 on the CPU": wanted}
    for kind, records in runs.items():
        found = losses(records)
        difference = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
        result[kind] = {"losses": found, "difference": difference, "bound": BOUNDS[kind]}
        if not difference <= BOUNDS[kind]:
            raise AssertionError(f"{kind} is off by {difference:.4f}: {json.dumps(result)}")
    return result


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records]


def training_run(arguments: Namespace, scratch: Path, name: str, words: str) -> list[dict]:
    """Train in a process of its own, as a user does; the training records of its metrics.jsonl."""
    from megalong.training.metrics import read_metrics, training_records

    folder = scratch / name
    command = [sys.executable, str(REPOSITORY / "pretrain_longnet.py"), *words.split()]
    command += ["--data-path", str(corpus(scratch, arguments.tiny)), "--split", "100,0,0"]
    command += ["--tokenizer-type", "ByteTokenizer", "--save", str(folder)]
    command += ["--save-interval", "1000000"]
    call(command, DS_ACCELERATOR=arguments.device)
    return training_records(read_metrics(folder / "metrics.jsonl"))


def corpus(scratch: Path, tiny: bool) -> Path:
    """The prefix of Python's own sources as tokens, made at the first call."""
    prefix = scratch / "data" / "python_text_document"
    if prefix.with_suffix(".idx").exists():
        return prefix
    text = scratch / "data" / "python.jsonl"
    text.parent.mkdir(exist_ok=True)
    collect = REPOSITORY / "examples" / "quickstart" / "collect_python_source.py"
    call([sys.executable, str(collect), "--output", str(text)])
    if tiny:
        text.write_text("\n".join(text.read_text().splitlines()[:20]) + "\n")
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py"), "--append-eod"]
    command += ["--input", str(text), "--output-prefix", str(scratch / "data" / "python")]
    call([*command, "--tokenizer-type", "ByteTokenizer", "--overwrite"])
    return prefix


def call(command: list[str], **environment: str) -> None:
    """Run a command; RuntimeError with the end of what it printed where it fails."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[1]).name} failed: {done.stderr[-2000:]}")


def rows(arguments: Namespace, _: Path) -> dict[str, object]:
    import torch
    import torch.distributed as dist

    from megalong.attention import DilatedPattern, dilated_attention
    from megalong.attention.dilated import sequence_parallel_attention
    from megalong.attention.exchange import SequenceGroup
    from megalong.attention.sequence_plan import subgroup_sizes
    from megalong.utils.torch_private import FakeStore

    result: dict[str, object] = {"errors": rows_errors(arguments)}
    shard, heads = (256, 2) if arguments.tiny else (32768, 12)
    pattern = DilatedPattern.geometric(8 * shard, shard // 16)
    dist.init_process_group("fake", rank=7, world_size=8, store=FakeStore())
    try:
        sizes = subgroup_sizes(pattern, shard, 8)
        sequence = SequenceGroup.create(dist.group.WORLD, sizes)
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        inputs = [
            torch.randn(1, shard, heads, 64, device=arguments.device, dtype=dtype).requires_grad_()
            for _ in "qkv"
        ]
        grad = torch.randn_like(inputs[0])

        def attend(function, *more):
            torch.autograd.grad(function(*inputs, pattern, *more), inputs, grad)

        repeats = 2 if arguments.tiny else 10
        for name, case in {
            "rank 7 of 8": lambda: attend(sequence_parallel_attention, sequence),
            "one device, the same tokens": lambda: attend(dilated_attention),
        }.items():
            result[name] = {"milliseconds": 1000 * seconds(case, repeats, arguments.device)}
    finally:
        dist.destroy_process_group()
    return {**result, "tokens": shard, "segment_lengths": pattern.segment_lengths}


def long(arguments: Namespace, _: Path) -> dict[str, object]:
    """The dry run has a process of its own, and a core, while the device is at work."""
    values = {
        **(SHAPES["125M"] | {"seq_length": 2**20}),
        "memory_path": "on",
        "precision": "bf16",
        "make_vocab_size_divisible_by": 1,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "data_path": "unread",
        "tokenizer_type": "ByteTokenizer",
    }
    if arguments.tiny:
        values |= {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 2}
        values |= {"ffn_hidden_size": 256, "seq_length": 2048, "tile_size": 512}
    vocabulary = 256 if arguments.tiny else VOCABULARY
    environment = {"DS_ACCELERATOR": arguments.device}
    with ThreadPoolExecutor(1) as other:
        dry = other.submit(in_process, "dry", values, vocabulary)
        real = in_process("gpu", values, vocabulary, environment)
    return {**real, "dry run": dry.result(), "flags": flags(values)}


def rows_errors(arguments: Namespace) -> dict[str, float]:
    """The relative error of the kernels that attend to other ranks' rows, forward and backward, by
    dtype; AssertionError beyond the bound."""
    import torch

    from megalong.attention import operators

    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        generator = torch.Generator().manual_seed(0)
        q, k, v, grad = (
            torch.randn(1, n, h, 64, generator=generator).to(arguments.device, dtype)
            for n, h in ((500, 4), (900, 2), (900, 2), (500, 4))
        )
        options = {"scale": 0.125, "backend": "auto"}
        out, lse = operators.attend_rows(q, k, v, **options)
        gradients = operators.attend_rows_backward(grad, q, k, v, out, lse, **options)
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in exact), scale=0.125, enable_gqa=True
        ).transpose(1, 2)
        pairs = zip(
            (out, *gradients),
            (wanted, *torch.autograd.grad(wanted, exact, grad.double())),
            strict=True,
        )
        errors[name] = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
        assert errors[name] <= ROWS_BOUND[name], f"attend_rows is off: {errors}"
    return errors


def seconds(function, repeats: int, device: str) -> float:
    """The median of some calls, after two that compile and warm up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for number in range(repeats + 2):
        wait()
        start = time.perf_counter()
        function()
        wait()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def device_name(device: str) -> str:
    if device == "cpu":
        return "CPU"
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def plot(results: dict[str, object], path: Path) -> None:
    """Plot losses by step; nothing where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
        return
    compared = dict(results.get("precision", {}))
    figure, (axes,) = axes_of()
    for name in ("fp32 on the CPU", *BOUNDS):
        if name in compared:
            found = compared[name]
            values = found if isinstance(found, list) else found["losses"]
            axes.plot(range(1, len(values) + 1), values, label=name, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=80)


PARTS = {"train": train, "precision": precision, "rows": rows, "long": long}

if __name__ == "__main__":
    run(main)
