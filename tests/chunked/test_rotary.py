"""Rotation and scales in place: the plain formulas, Megatron-core's, and themselves backwards."""

from types import SimpleNamespace

import pytest
import torch

from megalong.model.chunked import rotary
from megalong.model.chunked.rotary import rotate_, scale_, scaled
from tests.chunked.cases import rotary_case, rotated


@pytest.mark.parametrize("seed", range(20))
def test_random_case(seed, monkeypatch):
    if seed % 2:
        monkeypatch.setattr(rotary, "TILE", 500)
        monkeypatch.setattr(rotary, "SCALED_TILE", 500)
    x, angles = rotary_case(seed)
    around = x._base if x._is_view() else x
    before, untouched = x.clone(), around.clone()
    expected = rotated(before, angles)
    rotate_(x, angles)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    rotate_(x, angles, inverse=True)
    torch.testing.assert_close(x, before, rtol=0, atol=1e-12)
    x.copy_(before)
    assert torch.equal(around, untouched)  # what lies beside x is as it was

    leaf = before.clone().requires_grad_()
    grad = torch.randn_like(leaf)
    (found,) = torch.autograd.grad(rotated(leaf, angles), leaf, grad)
    turned = grad.clone()
    rotate_(turned, angles, inverse=True)
    torch.testing.assert_close(turned, found, rtol=0, atol=1e-12)

    scales, inverse = angles + 0.1, seed % 3 == 0
    factors = torch.cat((scales, scales), -1)[:, None, None]
    out = scaled(leaf, scales, inverse=inverse)
    assert torch.equal(out, before / factors if inverse else before * factors)
    (found,) = torch.autograd.grad(out, leaf, grad)
    scale_(grad, scales, inverse=inverse)
    assert torch.equal(found, grad)
    scale_(x, scales, inverse=inverse)
    assert torch.equal(x, out)
    x.copy_(before)
    assert torch.equal(around, untouched)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_as_megatron(dtype):
    """Bit for bit in float32 and float64; 16 bits round once, not four times."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    x, angles = rotary_case(1)
    angles = angles.to(torch.promote_types(dtype, torch.float32))
    config = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False
    )
    exact = rotated(x.to(dtype).double(), angles.double())
    table = torch.cat((angles, angles), -1)[:, None, None]
    theirs = apply_rotary_pos_emb(
        x.to(dtype), table, config, cp_group=SimpleNamespace(size=lambda: 1)
    )
    ours = x.to(dtype)
    rotate_(ours, angles)
    if dtype.itemsize >= 4:
        assert torch.equal(ours, theirs)
    else:
        errors = [(y.double() - exact).norm() for y in (ours, theirs)]
        assert errors[0] <= errors[1]


def test_what_does_not_fit_is_refused():
    x = torch.zeros(5, 1, 2, 6)
    for y, angles in (
        (x, torch.zeros(5, 6)),
        (x, torch.zeros(4, 3)),
        (x.transpose(2, 3).contiguous().transpose(2, 3), torch.zeros(5, 3)),
        (x.clone().requires_grad_(), torch.zeros(5, 3)),
    ):
        with pytest.raises(ValueError):
            rotate_(y, angles)
    with pytest.raises(ValueError):
        scale_(x, torch.zeros(4, 3))


def test_a_change_under_autograd_is_noticed():
    x = torch.randn(3, 1, 1, 4)
    weight = torch.randn(3, 1, 1, 4, requires_grad=True)
    loss = (x * weight).sum()
    rotate_(x, torch.rand(3, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
