"""What --memory-path auto reckons with, against steps on a GPU that is not there."""

import json
from functools import cache
from pathlib import Path

import pytest

from megalong.dry_run import fake_device
from tests.dry_run.memory_path_cases import SELDOM, USUAL
from tests.forked import run_on_fake_gpu
from tests.launching import made_once

pytestmark = pytest.mark.skipif(
    fake_device.compiler() is None, reason="the fake GPU needs a C++ compiler"
)


CASES = [*USUAL, *(pytest.param(case, marks=pytest.mark.long) for case in SELDOM)]


@pytest.fixture(scope="module")
def result_of(tmp_path_factory):
    """A function from a case to what was found of it."""

    @cache
    def results(which: str) -> dict[str, dict]:
        def make(path: Path) -> None:
            run_on_fake_gpu(str(Path(__file__).with_name("memory_path_cases.py")), path, which)

        return json.loads(made_once(tmp_path_factory, f"memory_path_{which}", make).read_text())

    return lambda case: results("usual" if case in USUAL else "seldom")[case]


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_on_the_safe_side_and_not_far_off(case, result_of):
    result = result_of(case)
    assert result["peak"] <= result["needs"] <= 1.7 * result["peak"]
    assert result["host"] <= 1.05 * result["needs_host"] + 2**29


@pytest.mark.parametrize("case", CASES)
def test_executed_flops_are_those_that_the_operators_count(case, result_of):
    result = result_of(case)
    assert sum(result["executed"].values()) == pytest.approx(result["flops"], rel=1e-6)


def test_tiles_and_recomputation_cost_no_more_than_megatrons(result_of):
    """Against full recomputation: less where the attention's output is kept, hardly more where
    the layer's input alone is."""
    full = result_of("off, full recomputation")["flops"]
    assert result_of("on")["flops"] < 1.10 * full
    assert result_of("on, full recomputation")["flops"] < 1.25 * full


def test_with_the_offload_more_layers_take_no_more_of_the_device_but_for_their_parameters(
    result_of,
):
    three, six = result_of("on"), result_of("on, six layers")
    parameters = 3 * (4 * 512 * 512 + 3 * 512 * 1408)
    # 22 bytes: weights, optimizer, gradients and their bucket. A tensor of a layer is 67 MB.
    assert six["peak"] - three["peak"] < 24 * parameters
    assert six["host"] == pytest.approx(2 * three["host"], rel=1e-6)
