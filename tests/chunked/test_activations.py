"""Activations against autograd of the plain formulas."""

import pytest
import torch

from megalong.model.chunked import mlp
from megalong.model.chunked.mlp import GELU, SWIGLU
from tests.chunked.cases import ACTIVATIONS, activation_case, plain


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_random_case(name, seed, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(mlp, "TILE", 500)
    x, grad = activation_case(ACTIVATIONS[name], seed)
    leaf = x.clone().requires_grad_()
    expected = plain(ACTIVATIONS[name], leaf)
    (slope,) = torch.autograd.grad(expected, leaf, grad)
    torch.testing.assert_close(ACTIVATIONS[name].forward(x), expected.detach(), rtol=0, atol=1e-12)
    y, grad_x = ACTIVATIONS[name].backward(grad, x)
    torch.testing.assert_close(y, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_x, slope, rtol=0, atol=1e-12)
    assert y.data_ptr() == grad.data_ptr() and grad_x.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_errors_are_no_larger_than_those_of_the_plain_path(name, dtype):
    x, grad = (t.to(dtype) for t in activation_case(ACTIVATIONS[name], 3))
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    plainly = [plain(ACTIVATIONS[name], leaf) for leaf in leaves]
    slopes = [
        torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]
        for y, leaf in zip(plainly, leaves, strict=True)
    ]
    forward = ACTIVATIONS[name].forward(x)
    assert forward.dtype == dtype
    y, grad_x = ACTIVATIONS[name].backward(grad, x)
    assert torch.equal(y, forward)
    for ours, (theirs, exact) in ((y, plainly), (grad_x, slopes)):
        errors = [(t.detach().double() - exact.detach()).norm() for t in (ours, theirs)]
        # A hundredth where both compute in float32 inside and round once: their ties.
        assert errors[0] <= (1.1 if dtype == torch.float32 else 1.01) * errors[1]


def test_what_does_not_fit_is_refused():
    x = torch.zeros(3, 4)
    for activation, grad in ((SWIGLU, x), (GELU, x.double()), (GELU, torch.zeros(4, 3).T)):
        with pytest.raises(ValueError):
            activation.backward(grad, x)
