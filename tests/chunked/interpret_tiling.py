"""The kernels in Triton's interpreter, on the CPU. A pytest file of a process of its own.

As tests/attention/triton/interpret_kernels.py, test_kernels_interpreted.py runs it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/chunked/interpret_tiling.py

float64 shows everything but rounding. The interpreter does not round bfloat16 to the nearest, so
bfloat16 is left to the GPU tests.
"""

import math

import pytest
import torch

from megalong.model.chunked.cross_entropy import (
    differentiate_logits_,
    read_logits_,
)
from megalong.model.chunked.rotary import rotate_
from megalong.model.chunked.triton import kernels
from tests.chunked.cases import (
    ACTIVATIONS,
    activation_case,
    logits_case,
    plain,
    read,
    rotary_case,
    rotated,
)

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-2}


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that ran."""
    names = []
    original = kernels.launch

    def launch(kernel, *arguments, **constants):
        names.append(kernel.__name__)
        original(kernel, *arguments, **constants)

    monkeypatch.setattr(kernels, "launch", launch)
    return names


@pytest.mark.parametrize("seed", range(12))
def test_rotation(seed, launches):
    dtype = list(TOLERANCE)[seed % 3]
    x, angles = rotary_case(seed)
    if dtype == torch.float64:  # a view still: what lies beside x must stay
        around = x._base if x._is_view() else x
    else:
        around = x = x.to(dtype)
        angles = angles.float()
    before, untouched = x.clone(), around.clone()
    rotate_(x, angles)
    expected = rotated(before.double(), angles.double())
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=4 * TOLERANCE[dtype])
    rotate_(x, angles, inverse=True)
    torch.testing.assert_close(x, before, rtol=0, atol=8 * TOLERANCE[dtype])
    x.copy_(before)
    assert torch.equal(around, untouched)
    assert launches == ["rotate_kernel"] * 2


def test_angles_at_the_ends_of_a_turn_and_between_quarters():
    eighths = torch.arange(17) * math.pi / 8
    angles = torch.cat((eighths, eighths.nextafter(eighths - 1), eighths.nextafter(eighths + 1)))
    angles = torch.cat((angles, torch.rand(2000) * 2 * math.pi))[:, None]
    x = torch.tensor([1.0, 0.0]).repeat(len(angles), 1)[:, None, None].clone()
    rotate_(x, angles)
    exact = torch.cat((angles.double().cos(), angles.double().sin()), -1)
    assert (x[:, 0, 0].double() - exact).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, seed, dtype, launches):
    activation = ACTIVATIONS[name]
    x, grad = (t[:9].to(dtype) for t in activation_case(activation, seed))
    leaf = x.double().requires_grad_()
    expected = plain(activation, leaf)
    (slope,) = torch.autograd.grad(expected, leaf, grad.double())
    expected = expected.detach()
    forward = activation.forward(x)
    y, grad_x = activation.backward(grad, x)
    assert forward.dtype == dtype and torch.equal(y, forward)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    torch.testing.assert_close(grad_x.double(), slope, **tolerance)
    assert launches == ["activate_kernel", "activate_backward_kernel"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed", range(4))
def test_cross_entropy(seed, dtype, launches):
    """dtype: of the gradient."""
    x, labels, first, grad = logits_case(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.empty_strided(x.shape, x.stride(), dtype=wide).copy_(x)
    *expected, labelled = read(x.double(), labels, first)
    found = read_logits_(x.clone(), labels, first)
    tolerance = {"rtol": TOLERANCE[wide], "atol": 10 * TOLERANCE[wide]}
    torch.testing.assert_close([t.double() for t in found], expected, **tolerance)

    lse = expected[0] + 0.5  # of a whole vocabulary
    slope = ((x.double() - lse[:, None]).exp() - labelled) * grad[:, None]
    grad_x = differentiate_logits_(x, labels, lse.to(wide), grad.to(wide), first, dtype=dtype)
    assert grad_x.dtype == dtype and (grad_x is x) == (dtype == wide)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    torch.testing.assert_close(grad_x.double(), slope, **tolerance)
    assert launches == ["read_kernel", "differentiate_kernel"]


def test_rows_that_end_in_a_number_that_is_none():
    """As without the kernels: no loss of a row that has nan or inf, and others as they are."""
    x, labels = torch.randn(4, 5000), torch.tensor([4999, 0, 0, 0])
    expected = x.logsumexp(1)
    x[1, 4999], x[2, 7], x[3, :4999] = math.nan, math.inf, -math.inf
    expected[3] = x[3, 4999]
    lse, target = read_logits_(x.clone(), labels)
    torch.testing.assert_close(lse[[0, 3]], expected[[0, 3]])
    assert lse[1:3].isnan().all() and torch.equal(target, x[torch.arange(4), labels])


def test_nothing_to_do():
    rotate_(torch.zeros(0, 1, 2, 4), torch.zeros(0, 2))
    rotate_(torch.zeros(3, 1, 0, 4), torch.zeros(3, 2))
    for activation in ACTIVATIONS.values():
        assert activation.forward(torch.zeros(0, 6)).shape[0] == 0


def test_a_function_that_has_no_kernel_runs_in_pytorch(launches, monkeypatch):
    monkeypatch.setattr(kernels, "FUNCTIONS", ())
    x, grad = torch.randn(3, 8), torch.randn(3, 4)
    y, _ = ACTIVATIONS["swiglu"].backward(grad, x.clone())
    assert torch.equal(y, ACTIVATIONS["swiglu"].forward(x)) and not launches
