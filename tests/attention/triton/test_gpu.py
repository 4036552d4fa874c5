"""The kernels on a GPU: precision, repeatability, uninitialised memory, huge tensors."""

import pytest
import torch
from attention_cases import Case, assert_agree, corners, random_case, run_backend, run_reference

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dilated_attention import choose_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

LADDER = DilatedPattern((256, 1024, 4096), (1, 4, 16))
CASES = [
    Case(
        "d64", 1024, DilatedPattern((128, 512, 1024), (1, 2, 4)), heads=8, kv_heads=8, head_dim=64
    ),
    Case(
        "d128-grouped", 1000, DilatedPattern((128, 512), (1, 4)), heads=8, kv_heads=2, head_dim=128
    ),
    Case("d256", 700, DilatedPattern((128, 512), (1, 3)), heads=2, kv_heads=1, head_dim=256),
    Case("d80-bidirectional", 900, DilatedPattern((100, 400), (1, 3)), head_dim=80, causal=False),
    Case("sparse-only", 900, DilatedPattern((256, 512), (2, 4)), head_dim=64, layout="sbhd"),
    Case(
        "documents-block",
        1000,
        DilatedPattern((128, 512), (1, 4), "block"),
        heads=8,
        kv_heads=2,
        head_dim=64,
        document_starts=(0, 10, 333, 777),
        batch=2,
    ),
    Case(
        "detached", 1000, DilatedPattern((128, 512), (1, 2)), head_dim=64, mix_gradient="detached"
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_sdpa(case, dtype, poisoned):
    inputs = case.inputs(dtype, "cuda")
    expected = run_reference(case, [x.double() for x in inputs])
    triton, sdpa = (run_backend(case, inputs, backend) for backend in ("triton", "sdpa"))
    for name, value in expected.items():
        present = torch.isfinite(value)
        assert torch.equal(torch.isfinite(triton[name]), present), name
        errors = [(x[name].double() - value)[present].norm() for x in (triton, sdpa)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * value[present].norm(), (name, errors)


@pytest.mark.parametrize(
    "case", [*corners(), *(random_case(seed) for seed in range(60))], ids=lambda case: case.name
)
def test_float32(case, poisoned):
    if case.head_dim > 128:
        pytest.skip("float32 stops at head_dim 128")
    inputs = case.inputs(torch.float32, "cuda")
    expected = run_reference(case, [x.double() for x in inputs])
    found = {name: x.double() for name, x in run_backend(case, inputs, "triton").items()}
    scale = max(1.0, (case.scale or 1.0) ** 2)
    assert_agree(found, expected, 3e-5 * scale)


def test_repeats_are_equal_bit_for_bit():
    case = Case("repeat", 4096, LADDER, heads=8, kv_heads=2, head_dim=128)
    inputs = case.inputs(torch.bfloat16, "cuda")
    first = run_backend(case, inputs, "triton")
    for _ in range(100):
        for name, value in run_backend(case, inputs, "triton").items():
            assert torch.equal(value, first[name]), name


def test_more_than_2_to_the_31_numbers():
    """The last segments of a huge tensor are those of the same rows alone."""
    length, last = 2**21 + 8192, 8192
    if torch.cuda.mem_get_info()[1] < 60 * 2**30:
        pytest.skip("needs 60 GB of GPU memory")
    pattern = DilatedPattern((2048, 8192), (1, 4))
    q, k, v, grad = (
        torch.randn(1, length, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(4)
    )
    assert q.numel() > 2**31

    def run(backend, *tensors):
        *qkv, grad = tensors
        qkv = [x.detach().requires_grad_() for x in qkv]
        out = dilated_attention(*qkv, pattern, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, qkv, grad)]

    whole = [x[:, -last:] for x in run("triton", q, k, v, grad)]
    tails = [x[:, -last:].contiguous() for x in (q, k, v, grad)]
    for found, alone in zip(whole, run("triton", *tails), strict=True):
        assert torch.equal(found, alone)
    for found, other in zip(whole, run("sdpa", *tails), strict=True):
        assert (found - other).norm() <= 2e-2 * other.norm()


def test_auto_takes_the_kernels_where_they_can_run():
    q = torch.randn(1, 4, 1, 64, device="cuda")
    assert choose_backend("auto", q.bfloat16()).__name__.endswith(".triton")
    assert choose_backend("auto", q.double()).__name__.endswith(".sdpa")
    assert choose_backend("auto", q.repeat(1, 1, 1, 8)).__name__.endswith(".sdpa")
