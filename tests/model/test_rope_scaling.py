"""Scaled rotary positions are those of Transformers and of Megatron-core."""

import math

import pytest
import torch
from transformers import LlamaConfig, modeling_rope_utils

from megalong.config import ModelConfig
from megalong.model.rope_scaling import rope_frequencies
from megalong.model.rotary import LongRotaryEmbedding, rotary_frequencies, score_scale
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


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("base", [1e4, 5e5, 1e6])
def test_plain_frequencies_are_to_the_last_bit_those_of_the_first_runs(head_dim, base):
    model = model_of({"kv_channels": head_dim, "rotary_base": base})
    frequencies = rotary_frequencies(model)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    assert torch.equal(frequencies, torch.pow(base, -exponents))
    exported, _ = rope_frequencies(model.rope_parameters, head_dim)
    exported = torch.tensor(exported, dtype=torch.float64)
    torch.testing.assert_close(exported, frequencies, rtol=1e-15, atol=0)


@pytest.mark.parametrize("mscales", [{}, {"yarn_mscale": 0.707, "yarn_mscale_all_dim": 0.5}])
@pytest.mark.parametrize("whole", [True, False])
def test_yarn_is_megatrons(mscales, whole):
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        YarnRotaryEmbedding,
    )

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


def test_ntk_slows_the_slowest_pair_by_the_factor():
    plain, _ = rope_frequencies(model_of({}).rope_parameters, 64)
    slower, _ = rope_frequencies(model_of({"rotary_ntk_factor": 8.0}).rope_parameters, 64)
    assert slower[0] == plain[0] == 1.0 and slower[-1] == pytest.approx(plain[-1] / 8)


def test_scores_are_scaled_by_yarn_alone():
    assert score_scale(model_of({})) is score_scale(model_of(SCALINGS[0])) is None
    assert score_scale(model_of({"position_embedding_type": "none"})) is None
    assert score_scale(model_of(YARN)) == pytest.approx((0.1 * math.log(4) + 1) ** 2 / 8)


def test_another_type_is_an_error():
    with pytest.raises(ValueError, match="'longrope': there are default, linear, llama3 and yarn"):
        rope_frequencies({"rope_type": "longrope", "rope_theta": 1e4}, 64)
