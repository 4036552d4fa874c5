"""Norms over tiles of rows: PyTorch's values, and gradients that tiles do not round."""

import pytest
import torch

from megalong.model.chunked.norms import norm, tiled_norm

KINDS = {
    "RMSNorm": lambda h: torch.nn.RMSNorm(h, eps=1e-5),
    "LayerNorm": lambda h: torch.nn.LayerNorm(h, eps=1e-5),
    "LayerNorm without bias": lambda h: torch.nn.LayerNorm(h, eps=1e-5, bias=False),
}


def made(kind: str, shape: tuple[int, ...], dtype: torch.dtype):
    """A module of torch.nn, an input and a gradient of the output; the numbers fit 16 bits."""
    module = KINDS[kind](shape[-1])
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=1.0)
    module.bfloat16().to(dtype)
    x, grad = (torch.randn(shape).bfloat16().to(dtype) for _ in range(2))
    return module, x.requires_grad_(), grad


def results(module, x, grad, tile_size=None):
    """Output and gradients: of the module, or of tiles of so many rows."""
    if tile_size is None:
        out = module(x)
    else:
        bias = getattr(module, "bias", None)
        kind = type(module).__name__
        out = tiled_norm(x, module.weight, bias, kind=kind, eps=1e-5, tile_size=tile_size)
    return out, *torch.autograd.grad(out, [x, *module.parameters()], grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 2, 5), (64, 1, 32)])
@pytest.mark.parametrize("tile_size", [1, 3, 64, 100])
def test_tiles_compute_what_the_module_computes(kind, shape, tile_size):
    torch.manual_seed(0)
    case = made(kind, shape, torch.float64)
    for one, other in zip(results(*case), results(*case, tile_size), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_values_are_equal_and_gradients_no_worse(kind, dtype):
    torch.manual_seed(0)
    module, x, grad = made(kind, (300, 2, 48), dtype)
    plain, tiled = results(module, x, grad), results(module, x, grad, tile_size=7)
    assert torch.equal(plain[0], tiled[0])
    assert [tensor.dtype for tensor in plain] == [tensor.dtype for tensor in tiled]
    exact = results(module.double(), x.detach().double().requires_grad_(), grad.double())
    for one, other, truth in zip(plain[1:], tiled[1:], exact[1:], strict=True):
        assert (other - truth).norm() <= 1.001 * (one - truth).norm()


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_it_keeps_its_input_and_nothing_else_of_that_size(kind):
    module, x, _ = made(kind, (256, 1, 8), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results(module, x, torch.ones_like(x), tile_size=16)
    long = {tensor.data_ptr() for tensor in kept if tensor.numel() >= 16 * 8 + 1}
    assert long == {x.data_ptr()}


def test_what_cannot_be_is_refused():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="RMSNorm without"):
        norm(x, x[0], x[0], "RMSNorm", 1e-5)
    with pytest.raises(ValueError, match="not BatchNorm"):
        norm(x, x[0], None, "BatchNorm", 1e-5)
    with pytest.raises(ValueError, match="at least one row"):
        tiled_norm(x, x[0], None, kind="RMSNorm", eps=1e-5, tile_size=0)
