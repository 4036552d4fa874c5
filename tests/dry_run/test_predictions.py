"""What a dry run says of a launch on the CPU is what each rank of the launch counts."""

import json
import sys
from pathlib import Path

import pytest

from tests.dry_run.prediction_cases import CASES, RANKS_SCRIPT, written
from tests.forked import run_ranks
from tests.launching import REPOSITORY, made_once, run


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, list]]:
    """Case -> "real" and "dry" -> what each rank wrote."""

    def make(path: Path) -> None:
        folders = written(path)
        run_ranks(2, RANKS_SCRIPT, "real", *folders)
        run_ranks(1, RANKS_SCRIPT, "dry", *folders)

    path = made_once(tmp_path_factory, "predictions", make)
    return {
        case: {
            kind: [
                json.loads((path / str(number) / f"{kind}-{r}.json").read_text()) for r in (0, 1)
            ]
            for kind in ("real", "dry")
        }
        for number, case in enumerate(CASES)
    }


@pytest.mark.parametrize("case", CASES)
def test_traffic_and_flops_are_exact(case, results):
    for real, dry in zip(results[case]["real"], results[case]["dry"], strict=True):
        assert real["traffic"] and real["traffic"] == dry["traffic"]
        assert real["flops"] and real["flops"] == dry["flops"]


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_of_a_launch_take_as_much_memory_at_the_peak(case, results):
    for real, dry in zip(results[case]["real"], results[case]["dry"], strict=True):
        assert real["memory"]["followed"] == pytest.approx(dry["memory"]["dry"], rel=0.01)


@pytest.mark.long
def test_resident_memory_is_that_of_the_dry_run(tmp_path):
    script = str(REPOSITORY / "tools" / "benchmarks" / "predicted.py")
    command = [sys.executable, script, "exact", "--output", str(tmp_path)]
    run([*command, "--cases", "DP 2, ZeRO 1, dilated"], timeout=600)  # at most 5% apart
    [row] = json.loads((tmp_path / "exact.json").read_text())
    assert len(row["ranks"]) == 2
    assert row["ranks"][0]["real"]["memory"]["measured"] > 2**26
    assert (tmp_path / "exact.md").exists()
