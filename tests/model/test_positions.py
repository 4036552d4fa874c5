"""Rotary angles, scaled and plain, and the scales of xPos: those of Transformers and Megatron-core
where these can count, and exact where not."""

import gc
import math
import weakref

import pytest
import torch
from transformers import LlamaConfig, modeling_rope_utils

from megalong.attention import DilatedPattern, dilated_attention
from megalong.config import ModelConfig
from megalong.config.model import longest_xpos
from megalong.model.chunked.rotary import rotate_, scale_, scaled
from megalong.model.rope_scaling import rope_frequencies
from megalong.model.rotary import LongRotaryEmbedding, XposScales, rotary_frequencies, score_scale
from megalong.parallel.cpu import enable_megatron_without_gpu
from megalong.utils.machine import use_gpu


@pytest.fixture(scope="module", autouse=True)
def without_gpu():
    if not use_gpu():
        enable_megatron_without_gpu()


YARN = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 4096}
SCALINGS = [
    {"rotary_seq_len_interpolation_factor": 4.0},
    {"rope_scaling_factor": 8.0, "rotary_base": 5e5},
    {"rope_scaling_factor": 32.0, "rope_original_length": 300},
    {"rope_scaling_factor": 4.0, "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 32.0},
    YARN,
    YARN | {"rotary_base": 1e6, "yarn_correction_range_round_to_int": False},
    YARN | {"yarn_mscale": 0.707, "yarn_mscale_all_dim": 1.0, "yarn_beta_fast": 20.0},
    YARN | {"yarn_attention_factor": 1.3, "yarn_beta_slow": 2.0},
    YARN | {"yarn_original_max_position_embeddings": 3},  # all pairs are slow
    {"yarn_rotary_scaling_factor": 1.0, "yarn_original_max_position_embeddings": 512},
]


class _InFloat64:
    """torch, but that float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def model_of(changes):
    return ModelConfig(**{"kv_channels": 64} | changes)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("changes", SCALINGS, ids=lambda changes: " ".join(map(str, changes)))
def test_frequencies_are_those_of_transformers(changes, head_dim, monkeypatch):
    model = model_of(changes | {"kv_channels": head_dim})
    rope = model.rope_parameters
    config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope))
    function = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]]
    rounded, _ = function(config, "cpu")
    monkeypatch.setattr(modeling_rope_utils, "torch", _InFloat64())
    expected, factor = function(config, "cpu")
    frequencies, ours = rope_frequencies(rope, head_dim)
    frequencies = torch.tensor(frequencies, dtype=torch.float64)
    assert expected.dtype == torch.float64 and rounded.dtype == torch.float32
    assert ours == pytest.approx(factor, rel=1e-14)
    torch.testing.assert_close(frequencies, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(frequencies.float(), rounded, rtol=1e-6, atol=0)
    for first in (0, 8190, 10**6 - 3):
        angles = LongRotaryEmbedding(model, first, one_per_pair=True)(4)[:, 0, 0]
        exact = torch.outer(torch.arange(first, first + 4, dtype=torch.float64), expected)
        torch.testing.assert_close(angles.cos(), exact.cos().float(), rtol=0, atol=1e-6)
        torch.testing.assert_close(angles.sin(), exact.sin().float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mscales", [{}, {"yarn_mscale": 0.707, "yarn_mscale_all_dim": 0.5}])
@pytest.mark.parametrize("whole", [True, False])
def test_yarn_is_megatrons(mscales, whole):
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    changes = YARN | mscales | {"yarn_correction_range_round_to_int": whole, "yarn_beta_fast": 24.0}
    theirs = YarnRotaryEmbedding(
        64,
        use_cpu_initialization=True,
        scaling_factor=4.0,
        original_max_position_embeddings=4096,
        beta_fast=24.0,
        mscale=mscales.get("yarn_mscale"),
        mscale_all_dim=mscales.get("yarn_mscale_all_dim"),
        correction_range_round_to_int=whole,
    )
    expected, factor = theirs(300)
    ours = LongRotaryEmbedding(model_of(changes))(300)
    torch.testing.assert_close(ours.cos(), expected.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sin(), expected.sin(), rtol=0, atol=1e-4)
    assert score_scale(model_of(changes)) == pytest.approx(factor**2 / 8)


def test_scores_are_scaled_by_yarn_alone():
    assert score_scale(model_of({})) is score_scale(model_of(SCALINGS[0])) is None
    assert score_scale(model_of({"position_embedding_type": "none"})) is None
    assert score_scale(model_of(YARN)) == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 8)


def test_another_type_is_an_error():
    with pytest.raises(ValueError, match="'longrope': there are default, linear, llama3 and yarn"):
        rope_frequencies({"rope_type": "longrope", "rope_theta": 1e4}, 64)


@pytest.mark.parametrize("factor", [None, 8.0])
def test_rotary_angles_agree_with_megatron_where_float32_can_count(factor):
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    ours = LongRotaryEmbedding(ModelConfig(kv_channels=64, rope_scaling_factor=factor))(500)
    scaling = {"rope_scaling": True, "rope_scaling_factor": factor} if factor else {}
    theirs = RotaryEmbedding(64, 1.0, use_cpu_initialization=True, **scaling)(500)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.cos(), theirs.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sin(), theirs.sin(), rtol=0, atol=1e-4)


def test_rotary_angles_in_pieces_and_once_per_pair(monkeypatch):
    """Bit for bit those of the whole sequence at once."""
    monkeypatch.setattr("megalong.model.rotary.PIECE", 64)
    model, first = ModelConfig(kv_channels=80), 2**30 + 5
    rotary = LongRotaryEmbedding(model, first)
    positions = torch.arange(first, first + 200, dtype=torch.float64)
    whole = torch.outer(positions, rotary.frequencies).remainder_(2 * math.pi).float()
    assert torch.equal(rotary(200), torch.cat((whole, whole), -1)[:, None, None])
    once = LongRotaryEmbedding(model, first, one_per_pair=True)(200)
    assert torch.equal(once, whole[:, None, None])


def test_rotary_angles_are_kept_as_long_as_their_model():
    """Those of a stage would else be there in the next one, whose are larger."""
    module = LongRotaryEmbedding(ModelConfig(kv_channels=8).resolve())
    angles = module(64)
    assert module(64) is angles and module(32) is not angles
    alive = weakref.ref(module)
    del module, angles
    gc.collect()
    assert alive() is None


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
