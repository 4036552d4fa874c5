"""What the benchmark compares must compute the same function."""

import importlib.util
from pathlib import Path

import pytest
import torch

from megalong.attention import DilatedPattern, dilated_attention

TOOL = Path(__file__).parents[2] / "tools" / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def benchmark_tool():
    spec = importlib.util.spec_from_file_location("attention_benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", ["dilated (gather)", "dilated (sdpa)"])
def test_contender_is_dilated_attention(benchmark_tool, name, kv_heads):
    pattern = DilatedPattern.geometric(256, 16)
    q, k, v = (
        torch.randn(2, 256, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (8, kv_heads, kv_heads)
    )
    mix_gradient = "detached" if "gather" in name else "exact"
    expected = dilated_attention(q, k, v, pattern, backend="reference", mix_gradient=mix_gradient)
    found = benchmark_tool.CONTENDERS[name](pattern)(q, k, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad),
        rtol=0, atol=1e-12,
    )  # fmt: skip
