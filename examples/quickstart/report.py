"""The last line of the quickstart: what the run reached on held-out files, beside gzip.

python examples/quickstart/report.py RUN [--seconds N]
"""

import gzip
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--seconds", type=int, help="how long everything took, to be shown")
    arguments = parser.parse_args()
    from megalong.training.metrics import read_metrics

    run_folder = arguments.run
    records = [r for r in read_metrics(run_folder / "metrics.jsonl") if r.get("split") == "test"]
    result = records[-1]
    print(f"loss curve:               {run_folder / 'loss_curve.png'}")
    print(f"loss against position:    {run_folder / 'loss_by_position.png'}")
    print(f"checkpoints and metrics:  {run_folder}")
    half = result["position_edges"][-1] // 2
    early, late = mean_loss(result, 0, 16), mean_loss(result, half, 2 * half)
    print(
        f"loss at the first 16 tokens of the context {early:.3f}, in its second half {late:.3f}"
        " nats per token"
    )
    took = ""
    if arguments.seconds is not None:
        took = f", {arguments.seconds // 60} min {arguments.seconds % 60:02d} s"
    print(
        f"\nheld-out perplexity {result['perplexity']:.1f}, {result['bits_per_byte']:.3f} bits per"
        f" byte (gzip -9 on the same text: {gzip_bits_per_byte(run_folder):.3f}){took}"
    )


def mean_loss(result: dict, start: int, stop: int) -> float:
    """Mean loss over the positions [start, stop), which are edges of buckets."""
    edges, losses = result["position_edges"], result["loss_by_position"]
    inside = [
        (loss, b - a)
        for a, b, loss in zip(edges, edges[1:], losses, strict=False)
        if start <= a and b <= stop
    ]
    return sum(loss * width for loss, width in inside) / sum(width for _, width in inside)


def gzip_bits_per_byte(run_folder: Path) -> float:
    """Bits per byte that gzip -9 needs for the text of the run's test split, as one file."""
    from megalong.config.arguments import parse_arguments
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    from megalong.training.run_data import open_run_data

    config = parse_arguments(["--config", os.fspath(run_folder / "config.yaml")])
    data = open_run_data(config)
    stream = data.held_out["test"]
    text = data.tokenizer.decode(stream.tokens(0, stream.tokens_per_epoch).tolist()).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


if __name__ == "__main__":
    run(main)
