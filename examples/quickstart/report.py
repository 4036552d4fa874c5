"""The last line of the quickstart: what the run reached on held-out files, beside gzip.

python examples/quickstart/report.py RUN [--seconds N]
"""

import argparse
import gzip
import os
from pathlib import Path

from megalong.arguments import parse_arguments
from megalong.quiet import quiet_libraries
from megalong.training.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--seconds", type=int, help="how long everything took, to be shown")
    arguments = parser.parse_args()
    run = arguments.run
    records = [r for r in read_metrics(run / "metrics.jsonl") if r.get("split") == "test"]
    result = records[-1]
    print(f"loss curve:               {run / 'loss_curve.png'}")
    print(f"loss against position:    {run / 'loss_by_position.png'}")
    print(f"checkpoints and metrics:  {run}")
    losses = result["loss_by_position"]
    early, late = mean(losses[: len(losses) // 8]), mean(losses[-len(losses) // 2 :])
    print(
        f"loss in the first eighth of the context {early:.3f}, in its second half {late:.3f}"
        " nats per token"
    )
    took = ""
    if arguments.seconds is not None:
        took = f", {arguments.seconds // 60} min {arguments.seconds % 60:02d} s"
    print(
        f"\nheld-out perplexity {result['perplexity']:.1f}, {result['bits_per_byte']:.3f} bits per"
        f" byte (gzip -9 on the same text: {gzip_bits_per_byte(run):.3f}){took}"
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def gzip_bits_per_byte(run: Path) -> float:
    """Bits per byte that gzip -9 needs for the text of the run's test split, as one file."""
    quiet_libraries()
    from megalong.training.run_data import open_run_data

    config = parse_arguments(["--config", os.fspath(run / "config.yaml")])
    data = open_run_data(config)
    stream = data.held_out["test"]
    text = data.tokenizer.decode(stream.tokens(0, stream.tokens_per_epoch).tolist()).encode()
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


if __name__ == "__main__":
    main()
