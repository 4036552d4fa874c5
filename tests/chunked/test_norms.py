"""Norms over tiles of rows have PyTorch's values, and gradients that tiles do not round; so have
norms over channels that ranks share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megalong.model.chunked import norms
from megalong.model.chunked.norms import Norm, divided_norm, norm, tiled_norm
from megalong.model.chunked.rows import TensorRanks

KINDS = {
    "RMSNorm": lambda h: torch.nn.RMSNorm(h, eps=1e-5),
    "LayerNorm": lambda h: torch.nn.LayerNorm(h, eps=1e-5),
    "LayerNorm without bias": lambda h: torch.nn.LayerNorm(h, eps=1e-5, bias=False),
}


def made(kind: str, shape: tuple[int, ...], dtype: torch.dtype):
    """A module of torch.nn, an input and a gradient of the output; the numbers fit 16 bits."""
    torch.manual_seed(0)
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
        bias, kind = getattr(module, "bias", None), type(module).__name__
        out = tiled_norm(x, module.weight, bias, kind=kind, eps=1e-5, tile_size=tile_size)
    return out, *torch.autograd.grad(out, [x, *module.parameters()], grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile_size", [1, 3, 100])
def test_tiles_compute_what_the_module_computes(kind, tile_size):
    for shape in ((1, 1, 8), (7, 2, 5)):
        case = made(kind, shape, torch.float64)
        for one, other in zip(results(*case), results(*case, tile_size), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_values_are_equal_and_gradients_no_worse(kind, dtype):
    """And the input is all that is kept of its size."""
    module, x, grad = made(kind, (300, 2, 48), dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        tiled = results(module, x, grad, tile_size=7)
    assert {t.data_ptr() for t in kept if t.numel() > 7 * 2 * 48} == {x.data_ptr()}
    plain = results(module, x, grad)
    assert torch.equal(plain[0], tiled[0])
    assert [tensor.dtype for tensor in plain] == [tensor.dtype for tensor in tiled]
    exact = results(module.double(), x.detach().double().requires_grad_(), grad.double())
    for one, other, truth in zip(plain[1:], tiled[1:], exact[1:], strict=True):
        assert (other - truth).norm() <= 1.001 * (one - truth).norm()


def test_what_cannot_be_is_refused():
    x = torch.ones(2, 3)
    for bias, kind in ((x[0], "RMSNorm"), (None, "BatchNorm")):
        with pytest.raises(ValueError):
            norm(x, x[0], bias, kind, 1e-5)
    with pytest.raises(ValueError):
        tiled_norm(x, x[0], None, kind="RMSNorm", eps=1e-5, tile_size=0)


class Threads(TensorRanks):
    """Ranks that are threads, all of which have the same `meeting`."""

    meeting = None

    def sum_(self, x):
        barrier, parts = self.meeting
        parts[self.rank] = x.clone()
        barrier.wait()
        x.copy_(sum(parts))
        barrier.wait()
        return x


def run(x, weight, bias, grad, how, ranks):
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    out = divided_norm(*inputs, *[None] * (3 - len(inputs)), how, ranks)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("size", [1, 4])
def test_channels_that_ranks_share(kind, size, monkeypatch):
    monkeypatch.setattr(norms, "TILE", 3 * 2 * 5)  # numbers: three rows of a rank of four
    torch.manual_seed(0)
    x = torch.randn(11, 2, 20, dtype=torch.float64) * 3 + 1
    weight, bias = torch.randn(2, 20, dtype=torch.float64)
    bias = bias if kind == "LayerNorm" else None
    grad, how = torch.randn_like(x), Norm(kind, 1e-3)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = norm(*inputs, *[None] * (3 - len(inputs)), *how)
    expected = out.detach(), *torch.autograd.grad(out, inputs, grad)

    Threads.meeting = threading.Barrier(size), [None] * size
    parts = [None if t is None else t.chunk(size, -1) for t in (x, weight, bias, grad)]
    with ThreadPoolExecutor(size) as pool:
        found = pool.map(
            lambda rank: run(*(p and p[rank] for p in parts), how, Threads(size, rank)), range(size)
        )
        found = list(found)
    for whole, *shares in zip(expected, *found, strict=True):
        torch.testing.assert_close(torch.cat(shares, -1), whole, rtol=0, atol=1e-12)
    for dtype in (torch.bfloat16, torch.float16):  # computed in float32, and rounded once
        low, w, b, g = (None if t is None else t.to(dtype) for t in (x, weight, bias, grad))
        out, *_ = run(low, w, b, g, how, TensorRanks())
        assert out.dtype == dtype
        exact = norm(*(None if t is None else t.double() for t in (low, w, b)), *how)
        torch.testing.assert_close(out, exact.to(dtype), rtol=1e-2, atol=1e-4)
