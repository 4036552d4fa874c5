"""What decoding keeps and costs against the length of the sequence, for each kind of attention.

    python tools/benchmarks/decode_cache.py --lengths 1024 2048 4096 8192 16384 --output OUT

A small model with random weights reads a sequence in chunks; at each length its cache is measured,
and the time of one more token. `most`, and what is dotted, is the number of rows that the pattern
predicts; what grows token by token has room for an eighth more. Writes decode_cache.json and
decode_cache.png.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import needed_packages

with needed_packages():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    from megalong.config.attention import KINDS, AttentionConfig
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
    add("--window-size", type=int, default=512)
    add("--sparse-block-size", type=int, default=512)
    add("--sparse-columns", type=int, default=8)
    add("--chunk", type=int, default=1024, help="tokens of one chunk of the prefill")
    add("--hidden-size", type=int, default=256)
    add("--layers", type=int, default=2)
    add("--threads", type=int, default=1)
    add("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"chunk": args.chunk, "threads": args.threads, "torch": torch.__version__}
    for attention in KINDS:
        results[attention] = measure(attention, args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "decode_cache.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, args.output / "decode_cache.png")


@torch.no_grad()
def measure(attention: str, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    heads = args.hidden_size // 64
    names = "segment_lengths dilation_rates window_size sparse_block_size sparse_columns"
    fields = {"attention": attention} | {name: getattr(args, name) for name in names.split()}
    pattern = AttentionConfig(**fields).resolve(max(args.lengths)).pattern(0)
    config = LongNetConfig(
        vocab_size=512, hidden_size=args.hidden_size, intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers, num_attention_heads=heads,
        max_position_embeddings=max(args.lengths), **fields,
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
            "most": pattern.cached_rows(length, heads, heads) // heads,
            "bytes": sum(x.untyped_storage().nbytes() for x in kept),
            "seconds_per_token": sorted(seconds)[len(seconds) // 2],
            "seconds_of_prefill_since_last": prefill,
        }
        records.append(record)
        print(attention, record, flush=True)
    return records


def plot(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for attention in KINDS:
        records = results[attention]
        lengths = [r["length"] for r in records]
        [line] = axes[0].plot(lengths, [r["rows"] for r in records], "o-", label=attention)
        axes[0].plot(lengths, [r["most"] for r in records], ":", color=line.get_color())
        axes[1].plot(
            lengths, [1e3 * r["seconds_per_token"] for r in records], "o-", label=attention
        )
    axes[0].set(xscale="log", yscale="log", xlabel="tokens so far", ylabel="rows kept per kv head")
    axes[1].set(xscale="log", xlabel="tokens so far", ylabel="milliseconds per token")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
