"""The exported model computes what Megatron-core's does, at every position."""

import math

import pytest
import torch

from megalong.config import ModelConfig
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.positions_longnet import rotary_angles
from megalong.parallel import launch
from tests.hf.models import megatron_logits, pair, random_tokens, resolved


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


LADDERS = {"segment_lengths": "16 32 64", "dilation_rates": "1 2 3"}
YARN = {"yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 50}
CASES = [
    {},
    LADDERS,  # 128 tokens pass the last segment length too
    LADDERS | {"num_query_groups": 4, "untie_embeddings_and_output_weights": True},
    LADDERS | {"num_query_groups": 1, "head_offsets": "block", "rotary_base": 1e6},
    LADDERS | {"head_offsets": "layer", "kv_channels": 32, "rotary_base": 500.0},
    LADDERS | {"head_offsets": "[[0,0,0,0],[0,1,1,0],[2,1,0,2]]"},
    {"normalization": "LayerNorm", "no_swiglu": True, "add_bias_linear": True},
    LADDERS | {"position_embedding_type": "none", "norm_epsilon": 1e-3},
    {"segment_lengths": "50 100", "dilation_rates": "3 7", "head_offsets": "mod"},  # holes
    {"attention": "dense", "ffn_hidden_size": 80},
    {"attention": "local", "window_size": 30, "num_query_groups": 2},
    LADDERS | {"attention": "sparse dilated", "sparse_block_size": 20, "sparse_columns": 3},
    {"add_qkv_bias": True, "qk_layernorm": True},
    LADDERS | {"rope_scaling_factor": 8.0, "rope_original_length": 50, "rotary_base": 200.0},
    LADDERS | YARN,
    {"rotary_seq_len_interpolation_factor": 3.0, "rotary_base": 300.0},
    {"rotary_ntk_factor": 3.0, "attention": "dense"},
    {"add_qkv_bias": True, "qk_layernorm": True, "normalization": "LayerNorm"},
    {"sub_layer_norm": True, "normalization": "LayerNorm", "no_swiglu": True, "kv_channels": 32},
    LADDERS | {"sub_layer_norm": True, "position_embedding_type": "xpos", "xpos_scale_base": 30},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda changes: " ".join(map(str, changes.values())))
@pytest.mark.parametrize("length", [128, 77])
def test_logits_equal_megatrons(changes, length, mesh):
    ours, theirs = pair(mesh, **changes)
    tokens = random_tokens(2, length)
    expected = megatron_logits(ours, tokens)
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert expected.std() > 0.5  # so that 1e-4 says something
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_gradients_equal_megatrons(mesh):
    """So that a model trained on either side is the same."""
    ours, theirs = pair(mesh, **LADDERS)
    tokens = random_tokens(2, 100)
    weight = torch.randn(2, 100, 257, generator=torch.Generator().manual_seed(2))
    logits = ours(input_ids=tokens, position_ids=torch.arange(100), attention_mask=None)
    (logits[..., :257] * weight).mean().backward()
    (theirs(tokens).logits * weight).mean().backward()
    expected = ours.chunks[0].embedding.word_embeddings.weight.grad[:257]
    torch.testing.assert_close(
        theirs.model.embed_tokens.weight.grad, expected, rtol=1e-3, atol=1e-6
    )


def test_angles_stay_exact_at_a_billion():
    from megalong.model.rotary import LongRotaryEmbedding

    first = 2**30 + 1
    config = LongNetConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=8)
    cos, sin = rotary_angles(config, [first], 2, "cpu")
    expected = LongRotaryEmbedding(ModelConfig(kv_channels=64), first_position=first)(2)[:, 0, 0]
    assert torch.equal(cos[0, :, 0], expected.cos()) and torch.equal(sin[0, :, 0], expected.sin())
    assert math.isclose(cos[0, 0, 0, 0].item(), math.cos(first), abs_tol=1e-6)
