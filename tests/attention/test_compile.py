"""The four operators: in torch.compile without a break, on fake tensors, and counted in FLOPs."""

import pytest
import torch
from attention_cases import assert_agree, corners, needs_inductor, random_case
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from megalong.attention import DilatedPattern, dilated_attention, operators
from megalong.attention.operators import choose_backend
from megalong.attention.patterns import ALL, Band

NAMES = ("grouped", "tail", "grouped-block", "whole-megatron-layout", "head-dim-large")
CORNERS = [case for case in corners() if case.name in NAMES]
LADDER = DilatedPattern((8, 16, 32), (1, 2, 4))


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()


def run(case, inputs, compiler=None, **options):
    """Output, log-sum-exp and gradients, compiled or not."""
    *qkv, grad = inputs
    qkv = [x.detach().requires_grad_() for x in qkv]

    def attend(q, k, v):
        return dilated_attention(q, k, v, case.pattern, return_lse=True, **case.options, **options)

    out, lse = (torch.compile(attend, backend=compiler, fullgraph=True) if compiler else attend)(
        *qkv
    )
    assert not lse.requires_grad
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse, *torch.autograd.grad(out, qkv, grad)), strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("sdpa", torch.float64), ("reference", torch.bfloat16)]
)
@pytest.mark.parametrize("case", CORNERS, ids=lambda case: case.name)
def test_operators_keep_their_promises(case, dtype, backend):
    """Schema, no shared memory, fake results as the true ones, and dynamic shapes: by PyTorch."""
    q, k, v, grad = case.inputs(dtype)
    ops = torch.ops.megalong
    options = (None, None, case.pattern.text, case.causal, 0.3, backend)
    results = ops.dilated_attention(q, k, v, *options)
    torch.library.opcheck(ops.dilated_attention.default, (q, k, v, *options))
    torch.library.opcheck(
        ops.dilated_attention_backward.default, (grad, q, k, v, *results, *options)
    )
    for band in (ALL, Band(before=2, after=9, first=3)):
        fewer = (k[:, 5:30], v[:, 5:30], None, None, band.text, 0.3, backend)
        results = ops.attend_rows(q, *fewer)
        torch.library.opcheck(ops.attend_rows.default, (q, *fewer))
        arguments = (grad, q, *fewer[:2], *results, *fewer[2:])
        torch.library.opcheck(ops.attend_rows_backward.default, arguments)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "case", [*CORNERS, *(random_case(seed, 100) for seed in range(12))], ids=lambda case: case.name
)
def test_compiled_equals_eager(case, backend):
    inputs = case.inputs()
    compiled = run(case, inputs, "aot_eager", backend=backend)
    assert_agree(compiled, run(case, inputs, backend=backend), 0)


def test_shared_keys_and_values():
    """Strides of zero, and one tensor as two inputs."""
    q = torch.randn(2, 40, 4, 8, dtype=torch.float64)
    k = torch.randn(2, 40, 1, 8, dtype=torch.float64).requires_grad_()

    def loss(q, k):
        shared = k.expand(2, 40, 4, 8)
        return dilated_attention(q, shared, shared, LADDER).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(function(q, k), k)[0] for function in (loss, compiled)]
    assert torch.equal(*gradients)


@needs_inductor
def test_inductor():
    case = next(case for case in CORNERS if case.name == "grouped")

    def layer(x_bsd, weight):
        """Projection, attention and gating: what surrounds the operator is compiled."""
        q, k, v = (x_bsd @ weight).unflatten(-1, (18, 8)).split([12, 3, 3], dim=2)
        out = dilated_attention(q, k, v, case.pattern)
        return (torch.nn.functional.silu(out) * q).flatten(2)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 45, 32, generator=generator, requires_grad=True)
    weight = torch.randn(32, 144, generator=generator).div(6).requires_grad_()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(x, weight)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (x, weight))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_lengths_do_not_compile_again():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q):
        return dilated_attention(q, q, q, LADDER)

    for length in (40, 57, 64):
        q = torch.randn(1, length, 4, 8)
        assert torch.equal(attend(q), dilated_attention(q, q, q, LADDER))
    assert counter.frame_count == 1


def test_autocast_does_not_reach_inside():
    q = torch.randn(1, 40, 4, 8)
    compiled = torch.compile(dilated_attention, backend="aot_eager", fullgraph=True)
    expected = dilated_attention(q, q, q, LADDER, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(q, q, q, LADDER, backend="reference")
    assert torch.equal(out, expected)


def test_shapes_without_numbers():
    """On the meta device; and for a GPU that is not there."""

    def attend(device, **options):
        q, k = (
            torch.empty(40, 2, heads, 8, device=device, dtype=torch.bfloat16, **options)
            for heads in (4, 2)
        )
        views = (x.transpose(0, 1) for x in (q, k, k))
        out, lse = dilated_attention(*views, LADDER, return_lse=True)
        assert out.shape == (2, 40, 4, 8) and out.transpose(0, 1).is_contiguous()
        assert lse.shape == (2, 4, 40) and lse.dtype == torch.float32
        return q, k, out

    q, k, out = attend("meta", requires_grad=True)
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape
    with FakeTensorMode():
        assert attend("cuda")[2].device.type == "cuda"


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("case", [*CORNERS, random_case(3, 100)], ids=lambda case: case.name)
def test_flops_are_those_of_the_pairs(case, backend):
    *qkv, grad = case.inputs(torch.float32)
    q, k, v = (x.requires_grad_() for x in qkv)
    pairs = case.pattern.attention_pairs(case.length, case.heads, case.kv_heads, case.causal)
    forward = 4 * case.head_dim * case.batch * pairs
    with FlopCounterMode(display=False) as counter:
        out = dilated_attention(q, k, v, case.pattern, backend=backend, **case.options)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.backward(grad)
    assert counter.get_total_flops() == 2.5 * forward

    rows = {"scale": 0.3, "backend": backend}
    k, v = k[:, :7], v[:, :7]
    for band, pairs in ((ALL, k.shape[1]), (Band(before=0, after=1), min(k.shape[1], case.length))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out, lse = operators.attend_rows(q, k, v, band, **rows)
            operators.attend_rows_backward(grad, q, k, v, out, lse, band, **rows)
        rest = 1 if band == ALL else case.length
        assert counter.get_total_flops() * rest == 14 * q.numel() * pairs


def test_no_kernel_runs_on_fake_tensors_for_a_gpu_that_is_not_there(monkeypatch):
    """With the kernels chosen that would run there."""
    monkeypatch.setattr(operators, "choose_backend", None)  # every operator asks it first
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, k, v, grad = (
            torch.empty(2, 4096, heads, 64, device="cuda", dtype=torch.bfloat16)
            for heads in (8, 2, 2, 8)
        )
        options = {"scale": 0.1, "backend": "auto"}
        pattern = DilatedPattern.geometric(4096, 512)
        out, lse = operators.forward(q, k, v, pattern, causal=True, **options)
        gradients = operators.backward(grad, q, k, v, out, lse, pattern, causal=True, **options)
        flops = 2 * pattern.attention_flops(4096, 8, 2, 64)
        assert counter.get_total_flops() == 3.5 * flops
        assert [x.dtype for x in (out, lse, *gradients)] == [
            torch.bfloat16, torch.float32, *[torch.bfloat16] * 3
        ]  # fmt: skip
        fewer = (torch.empty(2, 999, 2, 64, device="cuda", dtype=torch.bfloat16),) * 2
        out, lse = operators.attend_rows(q, *fewer, **options)
        shares = operators.attend_rows_backward(grad, q, *fewer, out, lse, **options)
        assert counter.get_total_flops() == 3.5 * (flops + 4 * q.numel() * 999)
        for x, share in zip((q, *fewer), shares, strict=True):
            assert (share.shape, share.dtype, share.device) == (x.shape, lse.dtype, x.device)
        assert choose_backend("auto", q).__name__.endswith(".triton")
        for shape, dtype in (((1, 1, 1, 64), torch.float64), ((1, 1, 1, 192), torch.float32)):
            x = torch.empty(shape, device="cuda", dtype=dtype)
            assert choose_backend("auto", x).__name__.endswith(".sdpa")
