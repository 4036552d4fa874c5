"""The public function: layouts, causality, autograd and error messages."""

import dataclasses

import pytest
import torch
from attention_cases import assert_agree, corners, random_case, run_backend

from megalong.attention import DilatedPattern, dense_attention, dilated_attention
from megalong.attention.dilated import DilatedPasses
from megalong.attention.operators import choose_backend

PATTERN = DilatedPattern((8, 16, 32), (1, 2, 4))


def qkv(length=40, heads=4, kv_heads=4, head_dim=8, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, length, h, head_dim, generator=generator, dtype=dtype)
        for h in (heads, kv_heads, kv_heads)
    ]


def test_one_dense_branch_is_dense_attention():
    q, k, v = qkv(kv_heads=2)
    whole = DilatedPattern((40,), (1,))
    for causal in (True, False):
        torch.testing.assert_close(
            dilated_attention(q, k, v, whole, causal=causal, scale=0.2),
            dense_attention(q, k, v, causal=causal, scale=0.2),
        )


def test_views_of_a_fused_projection():
    """Megatron's layout: (sequence, batch, kv_heads, (group + 2) * head_dim), split and turned."""
    length, batch, kv_heads, group, head_dim = 37, 2, 2, 3, 8
    fused = torch.randn(length, batch, kv_heads, (group + 2) * head_dim, dtype=torch.float64)
    fused.requires_grad_()
    q, k, v = fused.split([group * head_dim, head_dim, head_dim], dim=-1)
    q = q.reshape(length, batch, kv_heads * group, head_dim)
    views = [x.transpose(0, 1) for x in (q, k, v)]
    out = dilated_attention(*views, PATTERN)
    expected = dilated_attention(*(x.contiguous() for x in views), PATTERN)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    a, b = (torch.autograd.grad((x**2).sum(), fused, retain_graph=True)[0] for x in (out, expected))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_any_strides():
    q, k, v = qkv()
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    assert turned[0].stride(-1) != 1
    torch.testing.assert_close(
        dilated_attention(*turned, PATTERN), dilated_attention(q, k, v, PATTERN)
    )
    shared = k[:, :, :1].expand_as(k)
    torch.testing.assert_close(
        dilated_attention(q, shared, shared, PATTERN),
        dilated_attention(q, k[:, :, :1], k[:, :, :1], DilatedPattern((8, 16, 32), (1, 2, 4),
            PATTERN.offsets(4, 4))),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_no_position_sees_the_future(seed):
    case = random_case(seed, 100)
    q, k, v, _ = case.inputs()
    options = {**case.options, "causal": True}
    cut = case.length // 2
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, cut:] = 10 * torch.randn_like(x[:, cut:])
    before = dilated_attention(q, k, v, case.pattern, **options)[:, :cut]
    assert torch.equal(before, dilated_attention(*later, case.pattern, **options)[:, :cut])

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*inputs, case.pattern, **options)
    for gradient in torch.autograd.grad(out[:, :cut].sum(), inputs):
        assert not gradient[:, cut:].any()


def test_slices_of_heads_make_up_the_whole():
    """What tensor parallelism relies on."""
    q, k, v = qkv(heads=8, kv_heads=4)
    pattern = DilatedPattern((8, 32), (1, 8), "layer", layer=3)
    whole = dilated_attention(q, k, v, pattern)
    halves = [
        dilated_attention(
            q[:, :, 4 * n : 4 * n + 4], k[:, :, 2 * n : 2 * n + 2], v[:, :, 2 * n : 2 * n + 2],
            pattern.for_heads(8, 4, 4 * n, 4 * n + 4),
        )
        for n in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(halves, dim=2), whole)


def test_log_sum_exp_is_not_differentiable():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.bfloat16))
    for backend in ("sdpa", "reference"):
        out, lse = dilated_attention(q, k, v, PATTERN, backend=backend, return_lse=True)
        assert out.requires_grad and not lse.requires_grad
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert lse.shape == (2, 4, 40)


def test_gradient_for_some_inputs_only():
    q, k, v = qkv()
    k.requires_grad_()
    dilated_attention(q, k, v, PATTERN).sum().backward()
    assert k.grad is not None and q.grad is None


def test_recomputation_and_autocast_do_not_change_it():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float32))
    plain = torch.autograd.grad(dilated_attention(q, k, v, PATTERN).sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = checkpoint(dilated_attention, q, k, v, PATTERN, use_reentrant=False)
        again = torch.autograd.grad(out.sum(), (q, k, v))
    assert out.dtype == torch.float32
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [{"length": 0}, {"batch": 0}])
def test_nothing_in_nothing_out(shape):
    q, k, v = (x.requires_grad_() for x in qkv(**shape))
    out, lse = dilated_attention(q, k, v, PATTERN, return_lse=True)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape
    assert lse.shape == (q.shape[0], 4, q.shape[1])


def test_choice_of_a_backend():
    q = qkv()[0]
    for name, chosen in (("auto", "sdpa"), ("reference", "reference"), ("sdpa", "sdpa")):
        assert choose_backend(name, q).__name__.endswith(f".{chosen}")
    with pytest.raises(ValueError, match=r"backend must be auto, triton, .* got 'fastest'"):
        choose_backend("fastest", q)
    with pytest.raises(ValueError, match=r"no attention backend can run .*triton: "):
        choose_backend("triton", q)


def test_refuses():
    q, k, v = qkv()

    def refuse(message, *tensors, pattern=PATTERN, **options):
        with pytest.raises(ValueError, match=message):
            dilated_attention(*(tensors or (q, k, v)), pattern, **options)

    refuse(r"q must be \(batch, sequence, heads, head_dim\)", q[0], k, v)
    refuse("k is torch.float32 on cpu and q is torch.float64", q, k.float(), v)
    refuse("k is .* on meta", q, k.to("meta"), v)
    refuse("q must be float64, float32", q.long(), k, v)
    refuse("agree in sequence", q, k[:, 1:], v[:, 1:])
    refuse("agree in batch", q, k[1:], v[1:])
    refuse("agree in head_dim", q, k[..., 1:], v[..., 1:])
    refuse("k and v must have one shape", q, k, v[..., 1:])
    refuse("multiple of kv_heads", q, k[:, :, 1:], v[:, :, 1:])
    refuse("head_dim must be at least 1", q[..., :0], k[..., :0], v[..., :0])
    refuse("pattern must be a DilatedPattern", pattern=((8,), (1,)))
    refuse("table for 2 heads", pattern=DilatedPattern((8,), (2,), ((0, 1),)))
    refuse("backend must be auto, triton, sdpa, reference", backend="flash")
    refuse("scale must be positive", scale=-1.0)


def cut(case, inputs, group, groups):
    """One of so many groups of heads, as a case of its own."""
    heads, kv_heads = (
        slice(group * n // groups, (group + 1) * n // groups) for n in (case.heads, case.kv_heads)
    )
    pattern = case.pattern.for_heads(case.heads, case.kv_heads, heads.start, heads.stop)
    parts = (heads, kv_heads, kv_heads, heads)
    inputs = [x[:, :, part] for x, part in zip(inputs, parts, strict=True)]
    sizes = {"heads": case.heads // groups, "kv_heads": case.kv_heads // groups}
    return dataclasses.replace(case, pattern=pattern, **sizes), inputs


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("case", corners(), ids=lambda case: case.name)
def test_groups_of_heads_find_what_all_heads_do(case, backend):
    inputs = case.inputs()
    whole = run_backend(case, inputs, backend)
    for groups in (n for n in range(2, case.kv_heads + 1) if case.kv_heads % n == 0):
        parts = [run_backend(*cut(case, inputs, g, groups), backend) for g in range(groups)]
        axes = {name: 1 if name == "lse" else 2 for name in whole}
        together = {name: torch.cat([p[name] for p in parts], axes[name]) for name in whole}
        assert_agree(together, whole, 1e-12)


def test_passes_record_nothing_and_name_bad_inputs():
    case = corners()[0]
    q, k, v, grad = (x.requires_grad_() for x in case.inputs())
    passes = DilatedPasses(case.pattern)
    out, lse, kept = passes.forward(q, k, v)
    gradients = passes.backward(grad, q, k, v, out, lse, kept)
    assert kept == () and not any(x.requires_grad for x in (out, lse, *gradients))
    with pytest.raises(ValueError, match=r"k is torch\.float32"):
        passes.forward(q, k.float(), v)
