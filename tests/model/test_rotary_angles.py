"""Rotary angles of plain positions: Megatron-core's where those can count, and exact where not."""

import gc
import math
import weakref

import pytest
import torch

from megalong.config import ModelConfig
from megalong.model.rotary import LongRotaryEmbedding
from megalong.parallel.cpu import enable_megatron_without_gpu
from megalong.utils.machine import use_gpu


@pytest.fixture(scope="module", autouse=True)
def without_gpu():
    if not use_gpu():
        enable_megatron_without_gpu()


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


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"rotary_seq_len_interpolation_factor": 7.0},
        {"yarn_rotary_scaling_factor": 7.0, "yarn_original_max_position_embeddings": 8192},
    ],
    ids=["plain", "linear", "yarn"],
)
def test_rotary_angles_stay_exact_at_a_billion(scaling):
    """Integer arithmetic on the frequencies' own float64 values gives the turn exactly."""
    from fractions import Fraction

    first = 2**30 + 1
    rotary = LongRotaryEmbedding(ModelConfig(kv_channels=64, **scaling), first_position=first)
    angles = rotary(2)[1, 0, 0, :32]
    turn = Fraction(2 * math.pi)
    for angle, frequency in zip(angles.tolist(), rotary.frequencies.tolist(), strict=True):
        exact = float((Fraction(frequency) * (first + 1)) % turn)
        distance = abs(angle - exact)
        # float64 leaves 2^30 x 2^-53 of the angle, float32 one part in 2^24 of a turn.
        assert min(distance, 2 * math.pi - distance) < 1e-6


def test_rotary_angles_are_kept_as_long_as_their_model():
    """Those of a stage would else be there in the next one, whose are larger."""
    module = LongRotaryEmbedding(ModelConfig(kv_channels=8).resolve())
    angles = module(64)
    assert module(64) is angles and module(32) is not angles
    alive = weakref.ref(module)
    del module, angles
    gc.collect()
    assert alive() is None
