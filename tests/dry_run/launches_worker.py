"""Kernels and collectives of the calibration's own step: counted while it runs, by a dry run, and
as the cost model counts what the host starts. Writes them as JSON to the file it is given."""

import json
import sys
from pathlib import Path

import torch

from megalong.dry_run.calibration import (
    VOCABULARY,
    Clock,
    small_config,
    small_engine,
    step_launches,
)
from megalong.dry_run.step import dry_run, host_batches


def main(output: str) -> None:
    torch.set_num_threads(1)
    clock = Clock(torch.device("cpu"))
    config = small_config(clock)
    with small_engine(clock) as engine:
        batches = host_batches(config, engine.mesh)
        engine.train_step(batches, 0.0)
        counted = step_launches(engine, batches)
    dry = dry_run(config, VOCABULARY).work.launches()
    Path(output).write_text(json.dumps({"counted": counted, "dry": dry}))


if __name__ == "__main__":
    main(sys.argv[1])
