"""The scales of xPos: in place, and differentiable."""

import pytest
import torch

from megalong.model.chunked import xpos
from megalong.model.chunked.xpos import scale_, scaled
from tests.chunked.cases import rotary_case


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("inverse", [False, True])
def test_random_case(seed, inverse, monkeypatch):
    monkeypatch.setattr(xpos, "TILE", 500)
    x, scales = rotary_case(seed)
    scales += 0.1
    around = x._base if x._is_view() else x
    before, untouched = x.clone(), around.clone()
    factors = torch.cat((scales, scales), -1)[:, None, None]
    expected = before / factors if inverse else before * factors
    leaf = before.clone().requires_grad_()
    out = scaled(leaf, scales, inverse=inverse)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, leaf, grad)
    scale_(grad, scales, inverse=inverse)
    assert torch.equal(found, grad)
    scale_(x, scales, inverse=inverse)
    assert torch.equal(x, expected)
    x.copy_(before)
    assert torch.equal(around, untouched)
