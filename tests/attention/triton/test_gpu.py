"""The kernels on a GPU: precision, repeats, uninitialised memory, huge tensors, torch.compile.

Every other value of head_dim, dtype, causal and of the row layout modulo 16 numbers is a kernel
that takes a second or two to compile, so the many cases share one head_dim.
"""

import dataclasses

import pytest
import torch
from attention_cases import Case, assert_agree, corners, random_case, run_backend, run_reference
from band_cases import BandCase, random_ranges, run_band, run_definition

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dense import DensePasses
from megalong.attention.local import LocalPasses
from megalong.attention.operators import choose_backend
from megalong.attention.passes import attend
from megalong.attention.patterns import ALL, Band, DensePattern, LocalPattern, SparsePattern
from megalong.attention.sparse import SparsePasses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

P = DilatedPattern
CASES = [
    Case("d64", 1024, P((128, 512, 1024), (1, 2, 4)), heads=8, kv_heads=8, head_dim=64),
    Case("d64-grouped", 1000, P((128, 512), (1, 4)), heads=8, kv_heads=1, head_dim=64),
    Case(
        "d64-block", 1000, P((128, 512), (1, 4), "block"), heads=8, kv_heads=2, head_dim=64,
        batch=2,
    ),
    Case("d64-two-branches", 1000, P((128, 512), (1, 2)), head_dim=64),
    Case("d64-no-dense-branch", 900, P((256, 512), (2, 4)), head_dim=64, layout="sbhd", batch=2),
    Case("d80-bidirectional", 900, P((100, 400), (1, 3)), head_dim=80, causal=False),
    Case("d128-grouped", 1000, P((128, 512), (1, 4)), heads=8, kv_heads=2, head_dim=128),
    Case("d128-one-long-segment", 3000, P((3000,), (1,)), heads=2, kv_heads=2, head_dim=128),
    Case("d256", 700, P((128, 512), (1, 3)), heads=2, kv_heads=1, head_dim=256),
]  # fmt: skip
HALF = [(case, torch.bfloat16) for case in CASES] + [(CASES[0], torch.float16)]


@pytest.mark.parametrize(
    ("case", "dtype"), HALF, ids=[f"{case.name}-{str(dtype)[6:]}" for case, dtype in HALF]
)
def test_error_is_at_most_twice_that_of_sdpa(case, dtype, poisoned):
    inputs = case.inputs(dtype, "cuda")
    expected = run_reference(case, [x.double() for x in inputs])
    triton, sdpa = (run_backend(case, inputs, backend) for backend in ("triton", "sdpa"))
    for name, value in expected.items():
        present = torch.isfinite(value)
        assert torch.equal(torch.isfinite(triton[name]), present), name
        errors = [float((x[name].double() - value)[present].norm()) for x in (triton, sdpa)]
        size = float(value[present].norm())
        print(f"{name}: triton {errors[0] / size:.2e}, sdpa {errors[1] / size:.2e}")
        assert errors[0] <= 2 * errors[1] + 1e-6 * size, (name, errors)


FLOAT32 = [
    dataclasses.replace(case, head_dim=32) for case in corners() if "head-dim" not in case.name
]
FLOAT32 += [dataclasses.replace(random_case(seed), head_dim=32) for seed in range(60)]
FLOAT32 += [case for case in corners() if case.name == "head-dim-odd"]


@pytest.mark.parametrize("case", FLOAT32, ids=lambda case: case.name)
def test_float32(case, poisoned):
    inputs = case.inputs(torch.float32, "cuda")
    expected = run_reference(case, [x.double() for x in inputs])
    found = {name: x.double() for name, x in run_backend(case, inputs, "triton").items()}
    scale = max(1.0, (case.scale or 1.0) ** 2)
    assert_agree(found, expected, 3e-5 * scale)


@pytest.mark.parametrize("offsets", ["mod", "block"])
def test_repeats_are_equal_bit_for_bit(offsets, poisoned):
    """Always: there is no faster mode that is not deterministic."""
    pattern = P((256, 1024, 4096), (1, 4, 16), offsets)
    case = Case("repeat", 4096, pattern, heads=8, kv_heads=2, head_dim=128)
    inputs = case.inputs(torch.bfloat16, "cuda")
    first = run_backend(case, inputs, "triton")
    for _ in range(100):
        for name, value in run_backend(case, inputs, "triton").items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("documents", [False, True])
def test_more_than_2_to_the_31_numbers(documents):
    """The last segments of a huge tensor are those of the same rows alone."""
    length, last = 2**21 + 8192, 8192
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free GPU memory")
    pattern = P((2048, 8192), (1, 4))
    tensors = [torch.randn(1, length, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in "qkvg"]
    assert tensors[0].numel() > 2**31

    def run(backend, *tensors):
        *qkv, grad = tensors
        qkv = [x.detach().requires_grad_() for x in qkv]
        start = None
        if documents:  # of 3,000 tokens; one of them begins where the last segments do
            place = torch.arange(grad.shape[1], dtype=torch.int32, device="cuda")[None]
            before = grad.shape[1] - last
            start = ((place - before) // 3000 * 3000 + before).clamp(min=0)
        out = dilated_attention(*qkv, pattern, backend=backend, document_start=start)
        return [out.detach(), *torch.autograd.grad(out, qkv, grad)]

    whole = [x[:, -last:].clone() for x in run("triton", *tensors)]
    tails = [x[:, -last:].clone() for x in tensors]
    for found, alone in zip(whole, run("triton", *tails), strict=True):
        assert torch.equal(found, alone)
    for found, other in zip(whole, run("sdpa", *tails), strict=True):
        assert (found.float() - other.float()).norm() <= 2e-2 * other.float().norm()


BANDS = {
    "window": (Band(99, 1), 1000, 1000),
    "window on both sides": (Band(299, 300), 1000, 1000),
    "rows of earlier shards": (Band(before=700, first=900), 700, 900),
    "causal": (Band(after=1), 1000, 1000),
    "columns of earlier blocks": (Band(None, 0, 500, 256, 32), 1000, 160),
    "columns of later blocks": (Band(-1, None, 0, 256, 32), 1000, 160),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize(
    ("head_dim", "dtype", "tolerance"),
    [(64, torch.bfloat16, 2e-2), (128, torch.bfloat16, 2e-2), (64, torch.float32, 2e-5)],
    ids=["d64-bfloat16", "d128-bfloat16", "d64-float32"],
)
def test_rows_in_a_band(name, head_dim, dtype, tolerance, poisoned):
    from megalong.attention import triton as backend

    case = BandCase(*BANDS[name], batch=2, heads=4, kv_heads=2, head_dim=head_dim)
    inputs = case.inputs(dtype, "cuda")
    for found, expected in zip(
        run_band(case, backend, inputs), run_definition(case, inputs), strict=True
    ):
        there = torch.isfinite(expected)  # some queries see no key
        assert torch.equal(torch.isfinite(found), there)
        error = (found.double() - expected)[there].norm()
        assert error <= tolerance * expected[there].norm()


APART = [
    *(case for case in CASES if case.name in ("d64", "d64-block", "d128-grouped")),
    Case("d64-bidirectional", 900, P((100, 900), (1, 3)), head_dim=64, causal=False),
]


@pytest.mark.parametrize("case", APART, ids=lambda case: case.name)
def test_documents_kept_apart(case, poisoned):
    for seed in (2, 4, 6, 8):  # few and many, and each row of the batch has its own
        case = dataclasses.replace(case, document_seed=seed, batch=2)
        inputs = case.inputs(torch.bfloat16, "cuda")
        expected = run_reference(case, [x.double() for x in inputs])
        found = run_backend(case, inputs, "triton")
        for name, value in expected.items():
            there = torch.isfinite(value)
            assert torch.equal(torch.isfinite(found[name]), there), name
            error = (found[name].double() - value)[there].norm()
            assert error <= 2e-2 * value[there].norm(), (name, seed)


@pytest.mark.parametrize("name", ["window", "columns of earlier blocks", "all"])
def test_rows_in_ranges(name, poisoned):
    from megalong.attention import triton as backend

    band, queries, keys = BANDS.get(name, (ALL, 700, 900))
    case = BandCase(band, queries, keys, batch=2, heads=4, kv_heads=2, head_dim=64)
    inputs = case.inputs(torch.float32, "cuda")
    for seed in range(6):
        ranges = random_ranges(case, seed, "cuda")
        for found, expected in zip(
            run_band(case, backend, inputs, ranges), run_definition(case, inputs, ranges),
            strict=True,
        ):  # fmt: skip
            there = torch.isfinite(expected)
            assert torch.equal(torch.isfinite(found), there)
            error = (found.double() - expected)[there].norm()
            assert error <= 2e-5 * expected[there].norm()


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_waits_for_the_gpu(causal):
    """Documents come with every batch: their numbers stay where they are."""
    from megalong.attention import triton as backend

    case = Case("wait", 1000, P((128, 512), (1, 4)), head_dim=64, batch=2, causal=causal)
    band = BandCase(Band(99, 1), 300, 300, batch=2, heads=4, head_dim=64)
    *qkv, grad = case.inputs(torch.bfloat16, "cuda")
    qkv = [x.requires_grad_() for x in qkv]
    q, k, v, rows_grad = band.inputs(torch.bfloat16, "cuda")
    for seed in range(2):
        options = dataclasses.replace(case, document_seed=seed).options_on("cuda")
        within = {"scale": 0.125, "ranges": random_ranges(band, seed, "cuda")}
        torch.cuda.set_sync_debug_mode("error" if seed else "default")  # the first one compiles
        try:
            out = dilated_attention(*qkv, case.pattern, backend="triton", **options)
            torch.autograd.grad(out, qkv, grad)
            out, lse = backend.attend_rows(q, k, v, band.band, **within)
            backend.attend_rows_backward(rows_grad, q, k, v, out, lse, band.band, **within)
        finally:
            torch.cuda.set_sync_debug_mode("default")


KINDS = {
    "local": (LocalPasses, LocalPattern(300)),
    "sparse": (SparsePasses, SparsePattern(128, 16)),
    "dense": (DensePasses, DensePattern()),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 2e-5)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_attention(kind, dtype, tolerance, causal, poisoned):
    passes, pattern = KINDS[kind]
    case = Case(kind, 1000, P((1000,), (1,)), head_dim=64, heads=4, kv_heads=2, batch=2)
    *qkv, grad = case.inputs(dtype, "cuda")
    results = []
    for backend, kept in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.detach().to(kept).requires_grad_() for x in qkv]
        out = attend(*leaves, passes(pattern, backend=backend, causal=causal))
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(kept))])
    for found, value in zip(*results, strict=True):
        assert (found.double() - value).norm() <= tolerance * value.norm()


def test_auto_takes_the_kernels_where_they_can_run():
    q = torch.randn(1, 4, 1, 64, device="cuda")
    assert choose_backend("auto", q.bfloat16()).__name__.endswith(".triton")
    assert choose_backend("auto", q.double()).__name__.endswith(".sdpa")
    assert choose_backend("auto", q.repeat(1, 1, 1, 8)).__name__.endswith(".sdpa")
