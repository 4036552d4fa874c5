"""Where a run's numbers go: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megalong.config import Config


class MetricsLog:
    """Writes records to `metrics.jsonl` in the run folder and to TensorBoard.

    One JSON object a line. Training records have iteration, consumed_samples, consumed_tokens,
    loss, learning_rate, grad_norm, tokens_per_second; evaluations have iteration, split,
    consumed_tokens, loss, perplexity, bits_per_byte, tokens, position_edges, loss_by_position.
    One training record of a run has traffic: what the main process sent and received in a step, by
    axis and collective (`megalong.parallel.traffic`).
    Only the main process has one.
    """

    def __init__(self, config: Config, resumed_iteration: int):
        self._file = None
        self._board = None
        if config.run.save is not None:
            path = Path(config.run.save) / "metrics.jsonl"
            forget_after(path, resumed_iteration)
            self._file = path.open("a")
        if config.run.tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                config.run.tensorboard_dir, purge_step=resumed_iteration + 1
            )

    def training(self, record: dict[str, Any]) -> None:
        """One logged iteration."""
        self._write(record)
        self._scalars(record, "train", ("loss", "learning_rate", "grad_norm", "tokens_per_second"))

    def evaluation(self, record: dict[str, Any]) -> None:
        """One evaluation of one split."""
        self._write(record)
        self._scalars(record, record["split"], ("loss", "perplexity", "bits_per_byte"))

    def make_durable(self) -> None:
        """Flush to the disk: what a checkpoint says was done is in the log as well."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def _scalars(self, record: dict[str, Any], group: str, names: tuple[str, ...]) -> None:
        if self._board is not None:
            for name in names:
                if record[name] is None:
                    continue
                self._board.add_scalar(f"{group}/{name}", record[name], record["iteration"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line cut short by a killed run is left out."""
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def forget_after(path: Path, iteration: int) -> None:
    """Drop what a run resumed at `iteration` will write again: later training records, and
    evaluations at `iteration` itself, which come after its checkpoint.

    The file is replaced in one step, so that a run killed here loses nothing.
    """
    if not path.exists():
        return
    kept = [
        record
        for record in read_metrics(path)
        if record["iteration"] < iteration + ("split" not in record)
    ]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
    os.replace(aside, path)
