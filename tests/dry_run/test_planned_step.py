"""What is computed of a step is what is there when it is run, and the ranks that are planned are
the slowest and the fullest."""

import json
import sys
from pathlib import Path

import pytest

from megalong.dry_run import fake_device
from tests.dry_run.planned_cases import CASES, LAUNCHES
from tests.launching import made_once, run

pytestmark = [
    pytest.mark.skipif(fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"),
    pytest.mark.long,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    def make(path: Path) -> None:
        script = Path(__file__).with_name("planned_cases.py")
        run([sys.executable, str(script), str(path)], timeout=1800)

    return json.loads(made_once(tmp_path_factory, "planned.json", make).read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_planned_step_is_the_one_that_is_run(case, results):
    planned, run = (results["steps"][case][which] for which in ("planned", "run"))
    assert planned == run
    parts = {operation[0] for operation in run["operations"]}
    assert {"attention", "projections", "mlp", "optimizer"} <= parts
    assert {"weights", "optimizer", "activations"} <= run["memory"].keys()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_slowest_and_the_fullest_rank_are_planned(launch, results):
    found = results["launches"][launch]
    planned = [place["rank"] for place in found["planned"]]
    assert sum(place["count"] for place in found["planned"]) == len(found["flops"])
    for measure in ("flops", "memory"):
        of_all = found[measure]
        assert max(of_all) == max(of_all[rank] for rank in planned)
