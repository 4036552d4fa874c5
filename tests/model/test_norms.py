"""Norms in pieces, and which norms a layer gets."""

import pytest
import torch

from megalong.model import layer_spec as norms


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm])
@pytest.mark.parametrize("limit", [1, 6 * 5, 4 * 6 * 5, 7 * 6 * 5 - 1])
def test_a_norm_in_pieces_is_the_norm(kind, limit, monkeypatch):
    torch.manual_seed(0)
    norm = kind(5, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x, out_gradient = torch.randn(7, 6, 5).double().requires_grad_(), torch.randn(7, 6, 5).double()

    def run():
        out = norm(x)
        return out, *torch.autograd.grad(out, [x, *norm.parameters()], out_gradient)

    whole = run()
    calls = []
    original = kind.__mro__[2].forward
    monkeypatch.setattr(kind.__mro__[2], "forward", lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(norms, "MOST_ELEMENTS", limit)
    pieces = run()
    assert len(calls) > 1 and all(len(x) == 1 or x.numel() <= limit for _, x in calls)
    for one, other in zip(whole[:2], pieces[:2], strict=True):  # row by row: to the last bit
        assert torch.equal(one, other)
    for one, other in zip(whole[2:], pieces[2:], strict=True):  # sums over rows, in another order
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm])
def test_up_to_the_limit_nothing_is_cut_or_copied(kind, monkeypatch):
    monkeypatch.setattr(norms, "MOST_ELEMENTS", 7 * 5)
    monkeypatch.setattr(torch, "cat", None)
    kind(5, eps=1e-5)(torch.randn(7, 5))
