"""Time the tile sizes that the Triton kernels could have; write the best as a line of their table.

On the GPU to tune for (some minutes for each head_dim, most of them compiling):

    python tools/benchmarks/tune_attention.py --head-dim 128 --output tuned.json

prints the time of each candidate and writes the line for tile_sizes.py into tuned.json. The
kernels use it at once with MEGALONG_TRITON_CONFIGURATIONS=tuned.json; run
tests/attention/triton/test_gpu.py with that variable before you trust it.

Without a GPU:

    python tools/benchmarks/tune_attention.py --compile-only --generation 90 --head-dim 128

compiles the candidates and prints what ptxas says: registers, spills, and whether it fits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import product
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import torch

    from megalong.attention import DilatedPattern
    from megalong.attention.triton import tile_sizes
    from megalong.attention.triton.tile_sizes import (
        FILE_VARIABLE,
        KERNELS,
        SHARED_MEMORY,
        TileSizes,
        generation_of,
        line_name,
    )

# All that is ever tried: block_m, block_n, warps, stages. The kernels take other powers of two
# from 16 up as well.
CANDIDATES = {
    "forward": [*product((64, 128), (32, 64, 128), (4, 8), (2, 3))],
    "dq": [*product((64, 128), (32, 64, 128), (4, 8), (2, 3))],
    "dkdv": [*product((16, 32, 64), (64, 128), (4, 8), (2, 3))],
}


def main():
    args = parse_arguments()
    os.environ.pop(FILE_VARIABLE, None)  # the table, and no file over it
    if args.compile_only:
        compile_candidates(args)
    elif torch.cuda.is_available():
        tune(args)
    else:
        sys.exit("there is no GPU to time on: --compile-only does without")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--head-dim", type=int, default=128)
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    add("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    add("--most", type=int, help="try no more than so many candidates for each kernel")
    add("--compile-only", action="store_true", help="no GPU: say what ptxas makes of each")
    add("--generation", type=int, default=90, choices=SHARED_MEMORY, help="with --compile-only")
    add("--length", type=int, default=131072, help="tokens of the sequence that is timed")
    add("--heads", type=int, default=16)
    add("--kv-heads", type=int, help="default: as many as heads")
    add("--output", type=Path, help="file for the best line, as MEGALONG_TRITON_CONFIGURATIONS")
    return parser.parse_args()


def candidates(args, kernel: str) -> list[TileSizes]:
    return [TileSizes(*numbers) for numbers in CANDIDATES[kernel][: args.most]]


def compile_candidates(args):
    """One line of JSON for each variant of each candidate."""
    from kernel_resources import resources_of

    for kernel in args.kernels:
        for candidate in candidates(args, kernel):
            head = {"kernel": kernel, "head_dim": args.head_dim, "tile": candidate}
            try:
                for line in resources_of(
                    kernel, args.head_dim, args.dtype, args.generation, candidate
                ):
                    fits = line["shared"] <= SHARED_MEMORY[args.generation]
                    print(json.dumps({**line, "fits": fits}), flush=True)
            except Exception as error:  # one that does not compile is a result, too
                print(json.dumps({**head, "fits": False, "error": str(error)[:200]}), flush=True)


def tune(args):
    """The fastest candidate of each kernel, the others being those of the table."""
    dtype = getattr(torch, args.dtype)
    key = line_name(generation_of(torch.device("cuda")), dtype, args.head_dim)
    line = list(tile_sizes.TABLE[key])
    pattern = DilatedPattern.geometric(args.length)
    heads = (args.heads, args.kv_heads or args.heads, args.kv_heads or args.heads, args.heads)
    q, k, v, grad = (
        torch.randn(1, args.length, h, args.head_dim, device="cuda", dtype=dtype) for h in heads
    )
    print(f"{torch.cuda.get_device_name()}, {key}, {args.length} tokens; from {line}")
    for number, kernel in enumerate(KERNELS):
        if kernel not in args.kernels:
            continue
        times = {}
        for candidate in [TileSizes(*line[number]), *candidates(args, kernel)]:
            trial = [*line[:number], candidate, *line[number + 1 :]]
            with mock.patch.dict(tile_sizes.TABLE, {key: trial}):
                times[candidate] = milliseconds(kernel, pattern, q, k, v, grad)
            print(f"{kernel:<8} {tuple(candidate)!s:<20} {times[candidate]:9.3f} ms", flush=True)
        line[number] = min(times, key=times.get)
    row = {key: [list(sizes) for sizes in line]}
    print(f"in tile_sizes.py:\n    {json.dumps(key)}: {tuple(map(tuple, line))},")
    if args.output:
        args.output.write_text(json.dumps(row) + "\n")
        print(f"wrote {args.output}")


def milliseconds(kernel: str, pattern, q, k, v, grad) -> float:
    """Median time of the pass that the kernel is part of; infinite if it does not run."""
    import triton
    from triton.errors import TritonError

    from megalong.attention.triton import launch

    options = {"causal": True, "scale": q.shape[-1] ** -0.5}

    def forward():
        return launch.forward(q, k, v, pattern, **options)

    def backward():
        return launch.backward(grad, q, k, v, out, lse, pattern, **options)

    try:
        out, lse = forward()
        function = forward if kernel == "forward" else backward
        return triton.testing.do_bench(function, return_mode="median")
    except (TritonError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}".splitlines()[0][:100])
        return float("inf")


if __name__ == "__main__":
    main()
