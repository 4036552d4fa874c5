"""Every layout computes what one process computes: loss, grad norm, every updated weight, and the
held-out loss at every position."""

from functools import cache

import numpy as np
import pytest
import torch

from tests.forked import run_ranks
from tests.launching import made_once
from tests.training.parity_cases import (
    COPIES,
    LAYOUTS,
    LOW_PRECISION,
    SELDOM,
    cases,
)

WORKER = __file__.replace("test_parity", "parity_worker")
CASES = [
    pytest.param(case, marks=pytest.mark.long if which == "seldom" else ())
    for which in ("usual", "seldom")
    for case in cases(which)
]


def is_low(parameter) -> bool:
    [(_, _, model)] = parameter.values
    return model.split(",")[0] in LOW_PRECISION


@pytest.fixture(scope="module")
def result_of(corpus, tmp_path_factory):
    """A function from a case to its (losses, grad norms, weights, evaluation); one launch for all
    cases of equally many ranks."""

    @cache
    def results(ranks: int, which: str):
        def make(path):
            run_ranks(ranks, WORKER, corpus, path, which, timeout=600)

        return torch.load(made_once(tmp_path_factory, f"parity-{which}-{ranks}.pt", make))

    def result(case):
        return results(LAYOUTS[case[0]], "seldom" if case in SELDOM else "usual")[case]

    return result


def assert_same(one, two, tolerance: float) -> None:
    assert one[3]["tokens"] == two[3]["tokens"]
    for what in ("loss", "bits_per_byte", "loss_by_position"):
        values = [np.array(evaluation[3][what], float) for evaluation in (one, two)]  # None: NaN
        np.testing.assert_allclose(*values, rtol=tolerance, atol=0, err_msg=what)

    for what in ("echoed", "continued"):
        assert one[3].get(what) == two[3].get(what)
    tasks = [dict(evaluation.get("task", {"loss": 0.0})) for evaluation in (one[3], two[3])]
    losses = [task.pop("loss") for task in tasks]
    torch.testing.assert_close(*losses, rtol=tolerance, atol=0, msg="loss of a task")
    assert tasks[0] == tasks[1]

    assert_same_steps(one, two, tolerance)


def assert_same_steps(one, two, tolerance: float) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=0, msg="losses")
    torch.testing.assert_close(one[1], two[1], rtol=tolerance, atol=0, msg="grad norms")
    assert one[2].keys() == two[2].keys()
    for name, weight in one[2].items():
        difference = (weight - two[2][name]).abs().max()
        assert difference <= tolerance * weight.abs().max(), name


@pytest.mark.parametrize(
    "case",
    [parameter for parameter in CASES if not is_low(parameter)],
    ids=lambda case: f"{case[0]}-ZeRO{case[1]}-{case[2]}",
)
def test_layout_equals_one_process(result_of, case):
    layout, _, model = case
    reference = (
        "one vp" if "vp" in layout else "one",
        1,
        COPIES[model][0] if model in COPIES else model,
    )
    expected = result_of(reference)
    if reference[2] == "tied":  # so that to be equal here says something
        echoed = expected[3]["echoed"]
        assert 0 < sum(echoed) < len(echoed)
    assert_same(expected, result_of(case), tolerance=1e-5)


def test_a_loss_mask_means_what_is_done_by_hand(result_of):
    by_hand, one = (result_of(("one", 1, model)) for model in ("masked by hand", "masked"))
    assert_same_steps(by_hand, one, tolerance=1e-5)


@pytest.mark.parametrize(
    "case",
    [parameter for parameter in CASES if is_low(parameter)],
    ids=lambda case: f"{case[0]}-ZeRO{case[1]}-{case[2]}",
)
def test_low_precision_follows_float32(result_of, case):
    """bf16 keeps 8 bits: losses within half a percent, grad norms within five, and it learns."""
    losses, norms, *_ = result_of(case)
    exact_losses, exact_norms, *_ = result_of(("one", 1, "recompute selective"))  # the same model
    torch.testing.assert_close(losses, exact_losses, rtol=5e-3, atol=0)
    torch.testing.assert_close(norms, exact_norms, rtol=5e-2, atol=0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("layout", ["dp2", "sp2", "tp2"])
def test_zero_3_computes_in_bf16_as_zero_2_does(result_of, layout):
    """In the first step, with the same weights. Computed in float32 instead, the loss would differ
    by 2e-6 and the grad norm by 1e-3."""
    two, three = result_of((layout, 2, "bf16")), result_of((layout, 3, "bf16"))
    for step_two, step_three in ((two[0][0], three[0][0]), (two[1][0], three[1][0])):
        assert step_three == pytest.approx(step_two, rel=1e-6)
