"""The tiled MLP, attention and layer equal the plain computation: float64, all gradients."""

import contextlib
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dilated import DilatedPasses
from megalong.model.chunked.attention import TiledAttention
from megalong.model.chunked.layer import TiledLayer
from megalong.model.chunked.mlp import GELU, SWIGLU, TiledMLP
from megalong.model.chunked.norms import Norm, norm
from megalong.model.chunked.rows import AttentionWeights, MLPWeights

PATTERN = DilatedPattern((8, 32), (1, 3))


def weights_of(draw, kind, *shapes) -> list[torch.Tensor | None]:
    """Weights and biases: of norms of a size, of linear layers (rows, columns, bias), or None."""
    weights = []
    for shape in shapes:
        if isinstance(shape, int):  # a norm
            weights += [draw(shape), draw(shape) if kind == "LayerNorm" else None]
        elif shape is None:
            weights += [None, None]
        else:
            rows, columns, bias = shape
            weights += [draw(rows, columns), draw(rows) if bias else None]
    return weights


def mlp_weights(draw, hidden, inner, activation, kind, biases, out_norm=False) -> MLPWeights:
    width = inner // 2 if activation is SWIGLU else inner
    first, second = (inner, hidden, biases), (hidden, width, biases)
    return MLPWeights(*weights_of(draw, kind, hidden, first, second, width if out_norm else None))


def attention_weights(
    draw, hidden, kv_heads, group, d, kind, biases, qk_norm, out_norm=False
) -> AttentionWeights:
    width, of_head = kv_heads * group * d, d if qk_norm else None
    qkv, proj = (kv_heads * (group + 2) * d, hidden, biases), (hidden, width, biases)
    shapes = hidden, qkv, of_head, of_head, proj, width if out_norm else None
    return AttentionWeights(*weights_of(draw, kind, *shapes))


def plain_output(x, weights: MLPWeights | AttentionWeights, how):
    if weights.out_norm_weight is not None:
        x = norm(x, weights.out_norm_weight, weights.out_norm_bias, *how)
    return F.linear(x, weights.out_weight, weights.out_bias)


def plain_mlp(x, weights: MLPWeights, activation, how):
    inner = F.linear(norm(x, weights.norm_weight, weights.norm_bias, *how), *weights[2:4])
    if activation is SWIGLU:
        gate, up = inner.chunk(2, -1)
        inner = F.silu(gate) * up
    else:
        inner = F.gelu(inner)
    return x + plain_output(inner, weights, how)


def plain_attention(x, weights: AttentionWeights, angles, kv_heads, group, how):
    packed = F.linear(norm(x, weights.norm_weight, weights.norm_bias, *how), *weights[2:4])
    packed = packed.unflatten(2, (kv_heads, group + 2, -1))
    q, k, v = packed[:, :, :, :group].flatten(2, 3), packed[:, :, :, group], packed[:, :, :, -1]
    if weights.q_norm_weight is not None:
        q = norm(q, weights.q_norm_weight, weights.q_norm_bias, *how)
        k = norm(k, weights.k_norm_weight, weights.k_norm_bias, *how)
    if angles is not None:
        q, k = (rotated(x, angles) for x in (q, k))
    out = dilated_attention(*(x.transpose(0, 1) for x in (q, k, v)), PATTERN).transpose(0, 1)
    return x + plain_output(out.flatten(2), weights, how)


def rotated(x, angles):
    a, b = x.chunk(2, -1)
    cos, sin = (f(angles)[:, None, None].to(x.dtype) for f in (torch.cos, torch.sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def gradients(out, inputs, grad):
    present = [x for x in inputs if x is not None]
    return [out.detach(), *torch.autograd.grad(out, present, grad)]


def passes_of(kv_heads, group, groups):
    heads = kv_heads // groups * group
    return [
        DilatedPasses(PATTERN.for_heads(kv_heads * group, kv_heads, i * heads, (i + 1) * heads))
        for i in range(groups)
    ]


def distance(got, want) -> float:
    """The largest relative distance of a tensor of one list to that of the other."""
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("seed", range(20))
def test_pieces_equal_the_plain_layer(seed):
    """Random shapes and tiles, every norm, activation and bias; one token, too."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (x / shape[-1] ** 0.5 if len(shape) > 1 else x).requires_grad_()

    kind = choose.choice(["RMSNorm", "LayerNorm"])
    activation, biases = choose.choice([SWIGLU, GELU]), choose.random() < 0.5
    kv_heads, group, d = choose.choice([1, 2, 4, 6]), choose.choice([1, 2, 3]), 4
    groups = choose.choice([n for n in range(1, kv_heads + 1) if kv_heads % n == 0])
    length = choose.choice([1, 7, 40, 99])
    tile = choose.choice([1, 5, 13, 200]) if length < 50 else choose.choice([13, 200])
    hidden, how = choose.choice([6, 16]), Norm(kind, 1e-5)
    x = draw(length, choose.choice([1, 2]), hidden)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    angles = None
    if choose.random() < 0.7:
        angles = torch.rand(length, d // 2, generator=generator, dtype=torch.float64) * 6
    first = attention_weights(
        draw, hidden, kv_heads, group, d, kind, biases, qk_norm=choose.random() < 0.4,
        out_norm=choose.random() < 0.4,
    )  # fmt: skip
    second = mlp_weights(draw, hidden, 10, activation, kind, biases, choose.random() < 0.4)

    mlp = TiledMLP(how, activation, tile)
    attention = TiledAttention(
        d, group, passes_of(kv_heads, group, groups), how, tile,
        qk_norm=how if first.q_norm_weight is not None else None,
    )  # fmt: skip
    want = gradients(plain_mlp(x, second, activation, how), (x, *second), grad)
    assert (
        distance(
            gradients(TiledLayer(None, mlp, True)(x, None, None, second), (x, *second), grad), want
        )
        < 1e-10
    )
    for recompute in (False, True):
        half = TiledLayer(attention, None, recompute)(x, angles, first, None)
        want = gradients(plain_attention(x, first, angles, kv_heads, group, how), (x, *first), grad)
        assert distance(gradients(half, (x, *first), grad), want) < 1e-10
        both = TiledLayer(attention, mlp, recompute)(x, angles, first, second)
        plain_half = plain_attention(x, first, angles, kv_heads, group, how)
        want = gradients(plain_mlp(plain_half, second, activation, how), (x, *first, *second), grad)
        assert distance(gradients(both, (x, *first, *second), grad), want) < 1e-10


@pytest.mark.parametrize("hooks", [False, True])
def test_a_layer_that_has_overwritten_what_it_saved_goes_backward_once(hooks):
    """Also where hooks keep the saved tensor itself, and autograd does not look at its version."""
    draw = partial(torch.randn, dtype=torch.float64)
    x, how = draw(20, 1, 8, requires_grad=True), Norm("RMSNorm", 1e-5)
    weights = attention_weights(draw, 8, 2, 1, 4, "RMSNorm", False, False)
    identity = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    for recompute in (False, True):
        layer = TiledLayer(TiledAttention(4, 1, passes_of(2, 1, 2), how, 7), None, recompute)
        with identity if hooks else contextlib.nullcontext():
            loss = layer(x, None, weights, None).square().sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        if recompute:
            assert torch.equal(torch.autograd.grad(loss, x)[0], first)
        else:
            with pytest.raises(RuntimeError, match=r"backward once|inplace operation"):
                torch.autograd.grad(loss, x)


def test_what_needs_no_gradient_may_be_anything():
    """A layer whose input needs none, and weights that need none: the others get theirs."""
    draw = partial(torch.randn, dtype=torch.float64)
    how, x = Norm("RMSNorm", 1e-5), draw(9, 2, 8)
    weights = attention_weights(draw, 8, 2, 1, 4, "RMSNorm", False, False)
    second = mlp_weights(draw, 8, 10, SWIGLU, "RMSNorm", False)
    second.in_weight.requires_grad_()
    layer = TiledLayer(
        TiledAttention(4, 1, passes_of(2, 1, 1), how, 4), TiledMLP(how, SWIGLU, 4), False
    )
    layer(x, None, weights, second).square().sum().backward()
    found = second.in_weight.grad.clone()
    second.in_weight.grad = None
    half = plain_attention(x, weights, None, 2, 1, how)
    plain_mlp(half, second, SWIGLU, how).square().sum().backward()
    assert distance([found], [second.in_weight.grad]) < 1e-10
    assert second.out_weight.grad is x.grad is None
