"""torch.compile: one operator in the graph, without a break, with the results of eager mode."""

import pytest
import torch
from attention_cases import assert_agree, corners, needs_inductor, random_case
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dilated import _backward_operator, _operator

NAMES = ("grouped", "documents", "detached", "whole-megatron-layout", "head-dim-large")
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


@pytest.mark.parametrize("case", CORNERS, ids=lambda case: case.name)
def test_operators_keep_their_promises(case):
    """Schema, layout of the results, autograd and dynamic shapes, as PyTorch checks them."""
    q, k, v, grad = case.inputs()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    offsets = [o for row in case.pattern.offsets(case.heads, case.kv_heads) for o in row]
    starts = case.document_starts and torch.tensor(case.document_starts)
    pattern = (case.pattern.segment_lengths, case.pattern.dilation_rates, offsets, starts)
    options = (case.causal, 0.3, "sdpa", case.mix_gradient)
    torch.library.opcheck(_operator, (q, k, v, *pattern, *options))
    tensors = [x.detach() for x in (q, k, v, *_operator(q, k, v, *pattern, *options))]
    torch.library.opcheck(_backward_operator, (grad, *tensors, *pattern, *options))


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


def test_lengths_and_documents_do_not_compile_again():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q, starts):
        return dilated_attention(q, q, q, LADDER, document_starts=starts)

    for length in (40, 57, 64):
        q = torch.randn(1, length, 4, 8)
        for starts in ([0, 3, 20], [0, 11, 13]):
            expected = dilated_attention(q, q, q, LADDER, document_starts=starts)
            assert torch.equal(attend(q, torch.tensor(starts)), expected)
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


def test_compiled_refuses():
    q = torch.randn(1, 40, 4, 8)
    compiled = torch.compile(dilated_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="must be increasing"):
        compiled(q, q, q, LADDER, document_starts=torch.tensor([0, 9, 5]))
    with pytest.raises(ValueError, match="must be auto, triton, sdpa, reference"):
        compiled(q, q, q, LADDER, backend="flash")
