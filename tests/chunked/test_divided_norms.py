"""Norms over channels that ranks share equal the norms of whole rows, with all gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megalong.model.chunked import divided_norms
from megalong.model.chunked.divided_norms import divided_norm
from megalong.model.chunked.norms import norm
from megalong.model.chunked.tensor_ranks import TensorRanks
from megalong.model.chunked.weights import Norm


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
@pytest.mark.parametrize("size", [1, 2, 4])
def test_as_of_whole_rows(kind, size, monkeypatch):
    monkeypatch.setattr(divided_norms, "TILE", 3 * 2 * 5)  # numbers: three rows of a rank of four
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
            lambda rank: run(*(p and p[rank] for p in parts), how, Threads(size, rank)),
            range(size),
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
