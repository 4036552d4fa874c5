"""`make gpu` trains with it; here it stays alive on the CPU."""

import json
import sys

import pytest

from tests.launching import REPOSITORY, run


def results_of(folder, *parts: str) -> dict:
    script = REPOSITORY / "tools" / "benchmarks" / "training.py"
    flags = ["--device", "cpu", "--tiny", "--output", str(folder), "--parts", *parts]
    run([sys.executable, str(script), *flags])
    results = json.loads((folder / "training.json").read_text())
    assert list(results) == ["device", "tiny", *parts]
    return results


@pytest.mark.long
def test_the_benchmark_of_training_runs(tmp_path):
    results = results_of(tmp_path, "train", "rows")
    assert len(results["train"]["losses"]) == 2
    assert {"tokens_per_second", "mfu", "peak_memory_bytes"} <= results["train"].keys()
    assert results["rows"]["rank 7 of 8"]["milliseconds"] > 0


@pytest.mark.long
def test_its_parts_of_several_processes_run(tmp_path):
    results = results_of(tmp_path, "precision", "long")
    assert results["precision"]["bf16"]["difference"] <= results["precision"]["bf16"]["bound"]
    assert {"tokens_per_second", "mfu", "executed"} <= results["long"].keys()
    assert results["long"]["dry run"]["peak"] > 0 and len(results["long"]["step_seconds"]) == 3
    assert (tmp_path / "training.png").exists()
