"""What decoding keeps and costs against the length of the sequence, dilated and dense.

    python tools/benchmarks/decode_cache.py --lengths 1024 2048 4096 8192 16384 --output OUT

A small model with random weights reads a sequence in chunks; at each length its cache is measured,
and the time of one more token. Writes decode_cache.json and decode_cache.png.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.command_line import needed_packages

with needed_packages():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    from megalong.hf.configuration_longnet import LongNetConfig
    from megalong.hf.modeling_longnet import LongNetForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[1024 * 2**k for k in range(6)])
    add("--segment-lengths", type=int, nargs="+", default=[512, 2048, 8192])
    add("--dilation-rates", type=int, nargs="+", default=[1, 4, 16])
    add("--chunk", type=int, default=1024, help="tokens of one chunk of the prefill")
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=2)
    add("--threads", type=int, default=1)
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"chunk": args.chunk, "threads": args.threads, "torch": torch.__version__}
    for attention in ("dilated", "dense"):
        results[attention] = measure(attention, args)
    results["limit"] = sum(
        -(-w // r) for w, r in zip(args.segment_lengths, args.dilation_rates, strict=True)
    )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "decode_cache.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, args.output / "decode_cache.png")


@torch.no_grad()
def measure(attention: str, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    config = LongNetConfig(
        vocab_size=512, hidden_size=args.hidden_size, intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden_size // 64,
        max_position_embeddings=max(args.lengths), attention=attention,
        segment_lengths=args.segment_lengths, dilation_rates=args.dilation_rates,
    )  # fmt: skip
    model = LongNetForCausalLM(config).eval()
    cache, records = model.model.new_cache(), []
    for length in sorted(args.lengths):
        start = time.perf_counter()
        while (left := length - 8 - cache.get_seq_length()) > 0:
            tokens = torch.randint(512, (1, min(left, args.chunk)))
            model(tokens, cache=cache, logits_to_keep=1)
        prefill, seconds = time.perf_counter() - start, []
        for _ in range(8):  # the last tokens before the length, one at a time
            start = time.perf_counter()
            model(torch.randint(512, (1, 1)), cache=cache)
            seconds.append(time.perf_counter() - start)
        kept = [x for layer in cache.layers for x in (*layer.keys, *layer.values)]
        record = {
            "length": length,
            "rows": cache.rows(),
            "bytes": sum(x.untyped_storage().nbytes() for x in kept),
            "seconds_per_token": sorted(seconds)[len(seconds) // 2],
            "seconds_of_prefill_since_last": prefill,
        }
        records.append(record)
        print(attention, record, flush=True)
    return records


def plot(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for attention in ("dense", "dilated"):
        records = results[attention]
        lengths = [r["length"] for r in records]
        axes[0].plot(lengths, [r["rows"] for r in records], "o-", label=attention)
        axes[1].plot(
            lengths, [1e3 * r["seconds_per_token"] for r in records], "o-", label=attention
        )
    axes[0].axhline(results["limit"], color="gray", linestyle=":", label="sum of w / r")
    axes[0].set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="rows kept per kv head")
    axes[1].set(xscale="log", xlabel="tokens so far", ylabel="milliseconds per token")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
