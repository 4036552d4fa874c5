"""What attention makes of the positions of xPos, up to the longest sequence."""

import math

import pytest
import torch

from megalong.attention import DilatedPattern, dilated_attention
from megalong.config import ModelConfig
from megalong.config.model import longest_xpos
from megalong.model.chunked.rotary import rotate_, scale_, scaled
from megalong.model.rotary import XposScales, rotary_frequencies


def angles_of(model, first, length):
    positions = torch.arange(first, first + length, dtype=torch.float64)
    return torch.outer(positions, rotary_frequencies(model)).remainder_(2 * math.pi).float()


def encoded(q_sbhd, k_sbhd, model, first):
    """Queries and keys at the positions from `first` on."""
    q_sbhd, k_sbhd = q_sbhd.clone(), k_sbhd.clone()
    angles = angles_of(model, first, len(q_sbhd))
    scales = XposScales(model, first)(len(q_sbhd), q_sbhd.device)
    for x, inverse in ((q_sbhd, False), (k_sbhd, True)):
        rotate_(x, angles)
        scale_(x, scales, inverse=inverse)
    return q_sbhd, k_sbhd


def test_a_score_is_that_of_the_paper():
    """Equation 10: of the distance alone; pair i turns by it and decays with it."""
    model = ModelConfig(position_embedding_type="xpos", kv_channels=16, seq_length=30000)
    q, k = torch.randn(2, 300, 1, 1, 16, dtype=torch.float64)
    (q_1, k_1), (q_2, k_2) = (encoded(q, k, model, first) for first in (0, 29700))
    i = torch.arange(8, dtype=torch.float64)
    decays, turns = (i / 8 + 0.4) / 1.4, 10000.0 ** -(i / 8)
    for n, m in ((0, 0), (299, 0), (250, 249), (123, 45)):
        pairs_q, pairs_k = (torch.complex(*x[:, 0, 0].chunk(2, -1)) for x in (q, k))
        product = (
            pairs_q[n] * pairs_k[m].conj() * torch.polar(decays ** ((n - m) / 512), turns * (n - m))
        )
        expected = product.real.sum()
        for queries, keys in ((q_1, k_1), (q_2, k_2)):
            score = (queries[n, 0, 0] * keys[m, 0, 0]).sum()
            assert math.isclose(score, expected, rel_tol=0, abs_tol=3e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", [((64,), (1,)), ((40000,), (130,)), ((64, 40000), (1, 130))])
def test_attention_at_the_ends_of_the_longest_sequence(precision, pattern):
    """Values and gradients as in float64, from which they differ by the rounding of the inputs; and
    no score that a mask hides is anything but finite, or hidden."""
    longest = int(longest_xpos(precision, 512))
    model = ModelConfig(position_embedding_type="xpos", kv_channels=16, seq_length=longest)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    pattern = DilatedPattern(*pattern, head_offsets=[[0]] * len(pattern[0]))
    angles = angles_of(model, 0, longest)
    scales = XposScales(model)(longest, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, longest, 1, 1, 16, generator=generator).to(dtype)
    grad = 1e-7 * torch.randn(longest, 1, 1, 16, generator=generator).to(dtype)
    found = []
    for kind in (torch.float64, dtype):
        q, k, v = (x.to(kind).requires_grad_() for x in inputs)
        turned = []
        for x, inverse in ((q, False), (k, True)):
            first, second = x.chunk(2, -1)
            cos, sin = (f(angles.to(kind))[:, None, None] for f in (torch.cos, torch.sin))
            x = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
            turned.append(scaled(x, scales, inverse=inverse))
        out = dilated_attention(
            *(x.transpose(0, 1) for x in (*turned, v)), pattern, backend="sdpa"
        ).transpose(0, 1)
        found.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad.to(kind))])
    for name, want, got in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        for end in (slice(0, 300), slice(longest // 2, longest // 2 + 300), slice(-300, None)):
            error = (got[end] - want[end]).norm() / want[end].norm().clamp(min=1e-30)
            assert error < {"fp32": 1e-5, "bf16": 3e-2}[precision], (name, end)
