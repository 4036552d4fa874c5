"""What the benchmark compares must compute the same function; and the benchmark itself."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import needs_inductor

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dense import DensePasses
from megalong.attention.local import LocalPasses
from megalong.attention.passes import attend
from megalong.attention.patterns import DensePattern, LocalPattern, SparsePattern
from megalong.attention.reference import offered_keys
from megalong.attention.sparse import SparsePasses

TOOLS = Path(__file__).parents[2] / "tools" / "benchmarks"
PATTERNS = {
    "ladder": DilatedPattern.geometric(256, 16),
    "uneven": DilatedPattern((32, 64, 500), (1, 6, 12)),
    "rows in no branch": DilatedPattern((64,), (4,), "block"),
}
KINDS = {
    "local (masked)": (LocalPasses, LocalPattern(50)),
    "local (sdpa)": (LocalPasses, LocalPattern(50)),
    "sparse (sdpa)": (SparsePasses, SparsePattern(32, 3)),
    "dense (ours)": (DensePasses, DensePattern()),
}


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("contenders")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def contenders(module):
    return module.CONTENDERS


def tensors(kv_heads, dtype=torch.float64, length=256, head_dim=8, device="cpu", **options):
    generator = torch.Generator().manual_seed(0)
    for heads in (8, kv_heads, kv_heads):
        x = torch.randn(2, length, heads, head_dim, generator=generator, dtype=torch.float64)
        yield x.to(device=device, dtype=dtype).requires_grad_(**options)


def expected(name, pattern, q, k, v):
    if name.startswith("dense"):
        pattern = DilatedPattern((q.shape[1],), (1,))
    if "gather" in name:
        return torchscale(q, k, v, pattern)
    return dilated_attention(q, k, v, pattern, backend="reference")


def torchscale(q, k, v, pattern):
    """torchscale's function, written out: softmaxes over masked scores, weights detached."""
    (_, length, heads, head_dim), kv_heads = q.shape, k.shape[2]
    k, v = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * head_dim**-0.5
    outs, lses = [], []
    for offered in offered_keys(pattern, length, heads, kv_heads, causal=True):
        branch = scores.masked_fill(~offered, -torch.inf)
        lses.append(branch.logsumexp(-1).mT.detach())
        # A row without keys has no softmax; nor does it get a weight.
        weights = branch.masked_fill(~offered.any(-1, keepdim=True), 0.0).softmax(-1)
        outs.append(torch.einsum("bhij,bjhd->bihd", weights, v))
    weights = torch.stack(lses).softmax(0).nan_to_num()
    return sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_torchscale_differs_in_the_gradient_only(module, backend, kv_heads, pattern):
    q, k, v = tensors(kv_heads)
    found = module.mixed_as_torchscale(q, k, v, pattern, backend=backend)
    wanted, exact = torchscale(q, k, v, pattern), dilated_attention(q, k, v, pattern)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(x, (q, k, v), grad) for x in (found, wanted, exact)]
    torch.testing.assert_close(*gradients[:2], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[0][2], gradients[2][2], rtol=0, atol=1e-12)
    mixes = len(pattern.branches) > 1
    for name, mixed, true in zip("qk", gradients[0], gradients[2], strict=False):
        far = (mixed - true).norm() > 0.01 * true.norm()
        assert far == mixes, name


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", ["dense (flash)", "dilated (gather)", "dilated (sdpa)"])
def test_contender_is_its_attention(contenders, name, kv_heads, pattern):
    """The interpreter's tests hold "dilated (triton)" against the same reference."""
    q, k, v = tensors(kv_heads)
    found, wanted = contenders[name](pattern, q, k)(q, k, v), expected(name, pattern, q, k, v)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad),
        rtol=0, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", KINDS)
def test_contender_of_another_kind_is_its_attention(contenders, name, kv_heads):
    passes, pattern = KINDS[name]
    q, k, v = tensors(kv_heads)
    found = contenders[name](pattern, q, k)(q, k, v)
    wanted = attend(q, k, v, passes(pattern, backend="reference"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(wanted, (q, k, v), grad),
        rtol=0, atol=1e-12,
    )  # fmt: skip


@needs_inductor
@pytest.mark.parametrize(("kv_heads", "pattern"), [(8, "uneven"), (2, "rows in no branch")])
def test_flex_attention(contenders, kv_heads, pattern):
    """On a CPU its forward alone exists; test_gpu.py has both."""
    pattern = PATTERNS[pattern]
    q, k, v = (x.detach() for x in tensors(kv_heads, torch.float32, head_dim=16))
    found = contenders["dilated (flex)"](pattern, q, k)(q, k, v)
    wanted = expected("dilated (flex)", pattern, q, k, v)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.long
def test_benchmark_measures_and_reports(tmp_path):
    command = [sys.executable, str(TOOLS / "attention.py"), "--quick", "--kv-heads", "2"]
    command += ["--patterns", "L", "local", "--contenders", "dilated (gather)", "dilated (sdpa)"]
    command += ["local (masked)", "local (sdpa)", "--documents", "5"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    subprocess.run(
        [*command, "--output", str(tmp_path)], check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    report = json.loads((tmp_path / "attention.json").read_text())
    assert len(report["results"]) == 6
    for row in report["results"]:
        assert row["peak_memory_bytes"] > 0
        times = [row[kind] for kind in ("forward", "backward", "forward+backward")]
        assert all(x["least"] <= x["seconds"] <= x["largest"] for x in times)
        assert times[1]["seconds"] <= times[2]["seconds"]
        flops = [x["teraflops"] * x["seconds"] for x in times]
        assert flops[1] == pytest.approx(2.5 * flops[0])
    compared = [(row["pattern"], row["baseline"]) for row in report["comparisons"]]
    assert compared == 3 * [("L", "dilated (gather)")] + 3 * [("local", "local (masked)")]
    assert (tmp_path / "attention.png").stat().st_size > 5_000
    assert "local (sdpa), documents: 5" in (tmp_path / "attention.txt").read_text()
