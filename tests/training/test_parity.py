"""Two ranks compute what one computes: loss, grad norm and every updated weight."""

import pytest
import torch

from tests.launching import ranks_command, run
from tests.training.parity_worker import CASES

WORKER = __file__.replace("test_parity", "parity_worker")


@pytest.fixture(scope="module")
def results(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for ranks in (1, 2):
        run(ranks_command(ranks, WORKER, corpus, folder / f"{ranks}.pt"))
    return {ranks: torch.load(folder / f"{ranks}.pt") for ranks in (1, 2)}


def assert_same(one, two, tolerance: float) -> None:
    torch.testing.assert_close(one[0], two[0], rtol=tolerance, atol=0, msg="losses")
    torch.testing.assert_close(one[1], two[1], rtol=tolerance, atol=0, msg="grad norms")
    assert one[2].keys() == two[2].keys()
    for name, weight in one[2].items():
        difference = (weight - two[2][name]).abs().max()
        assert difference <= tolerance * weight.abs().max(), name


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" not in case])
def test_two_ranks_equal_one(results, case):
    assert_same(results[1][case], results[2][case], tolerance=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_stages_are_the_same_arithmetic(results, ranks, stage):
    assert_same(results[ranks]["zero1"], results[ranks][stage], tolerance=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_bf16_follows_float32(results, ranks, stage):
    """bf16 keeps 8 bits: losses within half a percent, grad norms within five, and it learns."""
    losses, norms, _ = results[ranks][f"{stage} bf16"]
    exact_losses, exact_norms, _ = results[ranks][stage]
    torch.testing.assert_close(losses, exact_losses, rtol=5e-3, atol=0)
    torch.testing.assert_close(norms, exact_norms, rtol=5e-2, atol=0)
    assert losses[-1] < losses[0]
