"""What a dry run says of a launch on the CPU is what each rank of the launch counts."""

import json
from pathlib import Path

import pytest

from tests.dry_run.prediction_cases import CASES, RANKS_SCRIPT, written
from tests.forked import run_ranks
from tests.launching import made_once


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
