"""What --memory-path auto reckons with, against steps on a GPU that is not there."""

import json
import sys
from pathlib import Path

import pytest

from megalong.planning import fake_device
from tests.dry_run.memory_path_cases import CASES
from tests.launching import made_once, run

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict]:
    def make(path: Path) -> None:
        script = Path(__file__).with_name("memory_path_cases.py")
        run([sys.executable, str(script), str(path)], timeout=900)

    return json.loads(made_once(tmp_path_factory, "memory_path.json", make).read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_on_the_safe_side_and_not_far_off(case, results):
    result = results[case]
    assert result["peak"] <= result["needs"] <= 1.7 * result["peak"]
    assert result["host"] <= 1.05 * result["needs_host"] + 2**29


@pytest.mark.parametrize("case", CASES)
def test_executed_flops_are_those_that_the_operators_count(case, results):
    result = results[case]
    assert sum(result["executed"].values()) == pytest.approx(result["flops"], rel=1e-6)


def test_tiles_and_recomputation_cost_no_more_than_megatrons(results):
    """Against full recomputation: less where the attention's output is kept, hardly more where
    the layer's input alone is."""
    full = results["off, full recomputation"]["flops"]
    assert results["on"]["flops"] < 1.10 * full
    assert results["on, full recomputation"]["flops"] < 1.25 * full


def test_with_the_offload_more_layers_take_no_more_of_the_device_but_for_their_parameters(results):
    three, six = results["on"], results["on, six layers"]
    parameters = 3 * (4 * 512 * 512 + 3 * 512 * 1408)
    assert six["peak"] - three["peak"] < 20 * parameters  # a tensor of a layer is 67 MB
    assert six["host"] == pytest.approx(2 * three["host"], rel=1e-6)
