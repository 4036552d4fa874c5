"""`make gpu` trains with it; here it stays alive on the CPU."""

import json
import sys

from tests.launching import REPOSITORY, run


def test_the_benchmark_of_training_runs(tmp_path):
    script = REPOSITORY / "tools" / "benchmarks" / "training.py"
    flags = ["--device", "cpu", "--tiny", "--output", str(tmp_path)]
    run([sys.executable, str(script), *flags])
    results = json.loads((tmp_path / "training.json").read_text())
    assert len(results["train"]["losses"]) == 2
    assert {"tokens_per_second", "mfu", "peak_memory_bytes"} <= results["train"].keys()
    assert results["precision"]["bf16"]["difference"] <= results["precision"]["bf16"]["bound"]
    assert results["rows"]["rank 7 of 8"]["milliseconds"] > 0
    assert {"tokens_per_second", "mfu", "executed"} <= results["long"].keys()
    assert results["long"]["dry run"]["peak"] > 0 and len(results["long"]["step_seconds"]) == 3
    assert (tmp_path / "training.png").exists()
