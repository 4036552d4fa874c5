"""The model: Megatron-core's GPTModel with our attention, positions and initial weights."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalong.config.arguments import parse_arguments
from megalong.model import layer_spec as norms
from megalong.model.build import (
    build_model,
    initialize_parameter,
    normal_numbers,
    transformer_config,
)
from megalong.model.parameters import count_parameters, decays, parameters
from megalong.model.stage import canonical_name, named_parameters
from megalong.model.tiled_layer import attention_weights, mlp_weights
from megalong.parallel import launch
from tests.launching import small_run_flags

VOCAB_SIZE = 257
LENGTH = 128


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


def resolved(**changes):
    return parse_arguments(small_run_flags("unused", **changes)).resolve(1)


@pytest.fixture
def build(mesh):
    def build(**changes):
        config = resolved(**changes)
        return build_model(config, VOCAB_SIZE, mesh), config

    return build


def logits(model, tokens):
    positions = torch.arange(tokens.shape[1])
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=positions, attention_mask=None)


@pytest.fixture
def tokens():
    return torch.randint(VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_one_full_branch_is_the_vanilla_transformer(tokens, build):
    dense, _ = build(attention="dense")
    dilated, _ = build(segment_lengths=LENGTH, dilation_rates=1)
    torch.testing.assert_close(logits(dilated, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"untie_embeddings_and_output_weights": True},
        {"linear_cross_entropy": True, "loss_chunk_size": 50},
    ],
    ids=lambda changes: " ".join(changes) or "tied",
)
def test_rows_that_fill_up_the_vocabulary_are_never_the_likeliest(changes, tokens, build):
    plain, _ = build(**{name: changes[name] for name in changes if name.startswith("untie")})
    labels = logits(plain, tokens)[..., :VOCAB_SIZE].argmax(-1)
    inputs = {"input_ids": tokens, "position_ids": torch.arange(LENGTH), "attention_mask": None}
    own = {"padded_vocab_size": 384}  # as many rows, which an export has too
    for more, right in (({}, True), (own, False)):
        model, _ = build(**changes, **more)
        weights = dict(named_parameters(model))
        weight = weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])
        with torch.no_grad():  # one of them is likelier than all others
            weight[300].fill_(1e4)[::2] = 7e4
            weight[301] = -weight[300]
            losses, likeliest = model(**inputs, labels=labels, beside="likeliest")
        assert losses.shape == likeliest.shape == labels.shape
        assert (likeliest == right).all()


def test_every_norm_can_norm_in_pieces(build):
    for normalization, kind in (("RMSNorm", norms.RMSNorm), ("LayerNorm", norms.LayerNorm)):
        model, _ = build(normalization=normalization, qk_layernorm=True)
        plain = torch.nn.RMSNorm, torch.nn.LayerNorm
        found = [type(module) for module in model.modules() if isinstance(module, plain)]
        assert found == [kind] * 9  # four in each of two layers, and the last


def test_gelu_is_the_exact_one_also_on_a_gpu(build, monkeypatch):
    """Megatron-core's fused path for a GELU with a bias takes the approximation by tanh."""
    flags = {"no_swiglu": True, "add_bias_linear": True}
    model, config = build(**flags)
    mlp, x = model.chunks[0].decoder.layers[0].mlp, torch.linspace(-4, 4, 64).expand(3, 1, 64)
    hidden = x @ mlp.linear_fc1.weight.T * 50
    mlp.linear_fc1.weight.data *= 50
    expected = torch.nn.functional.gelu(hidden) @ mlp.linear_fc2.weight.T
    for gpu in (False, True):
        monkeypatch.setattr("megalong.model.build.use_gpu", lambda gpu=gpu: gpu)
        mlp.config = transformer_config(config)
        torch.testing.assert_close(mlp(x)[0], expected, rtol=1e-5, atol=1e-6)
        gated = transformer_config(resolved(add_bias_linear=True))
        assert gated.bias_activation_fusion == gpu  # SwiGLU is the same function in either path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization": "LayerNorm", "no_swiglu": True, "add_bias_linear": True},
        {"num_query_groups": 1, "untie_embeddings_and_output_weights": True},
        {"position_embedding_type": "none", "head_offsets": "block"},
        {"head_offsets": "layer", "kv_channels": 32},
    ],
    ids=lambda changes: " ".join(map(str, changes)) or "defaults",
)
def test_no_logit_depends_on_a_later_token(changes, tokens, build):
    model, _ = build(**changes)
    changed = tokens.clone()
    changed[:, 77:] = (changed[:, 77:] + 1) % VOCAB_SIZE
    before, after = logits(model, tokens), logits(model, changed)
    assert torch.equal(before[:, :77], after[:, :77])
    assert not torch.equal(before[:, 77:], after[:, 77:])


def test_attention_takes_the_scale_of_scores_that_megatron_gives_it(build):
    yarn = {"yarn_rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 32}
    plain, sharper = (
        build(num_query_groups=4, **changes)[0].chunks[0].decoder.layers[0].self_attention
        for changes in ({}, yarn)
    )
    assert plain.config.softmax_scale is None
    factor = sharper.config.softmax_scale * math.sqrt(16)
    assert factor == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    q, k, v = torch.randn(3, LENGTH, 1, 4, 16)  # (s, b, heads, d)
    expected = plain.core_attention(factor * q, k, v, None)
    torch.testing.assert_close(sharper.core_attention(q, k, v, None), expected, rtol=0, atol=1e-5)


def test_an_initial_weight_depends_on_seed_and_name_only(build, mesh):
    model, config = build()
    other, _ = build(num_layers=4)  # the first layers of a deeper model, but for the depth's scale
    ours, theirs = dict(named_parameters(model)), dict(named_parameters(other))
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(ours[name], theirs[name])
    assert ours[name].std().item() == pytest.approx(config.model.init_method_std, rel=0.05)
    residual = "decoder.layers.1.mlp.linear_fc2.weight"
    torch.testing.assert_close(ours[residual], theirs[residual] * math.sqrt(2))
    before = ours[name].clone()
    initialize_parameter(name, ours[name], config, mesh)
    assert torch.equal(ours[name], before)
    reseeded, _ = build(seed=2)
    assert not torch.equal(dict(named_parameters(reseeded))[name], before)


@pytest.mark.parametrize("flags", [{}, {"no_swiglu": True, "num_query_groups": 4}])
def test_sub_layer_norms_come_with_the_initial_weights_of_magneto(build, flags):
    """Xavier's, times sqrt(log 2N) but for queries and keys; the rest is as without them."""
    plain, config = build(hidden_size=256, **flags)
    model, _ = build(hidden_size=256, sub_layer_norm=True, **flags)
    known, found = (dict(named_parameters(model)) for model in (plain, model))
    layer, gain, model = "decoder.layers.1.", math.sqrt(math.log(2 * 2)), config.model

    def deviation_of(weight):
        return pytest.approx(math.sqrt(2 / sum(weight.shape)), rel=0.03)

    qkv = found[layer + "self_attention.linear_qkv.weight"].unflatten(0, (-1, model.kv_channels))
    group = model.num_attention_heads // model.num_query_groups
    q_k_v = qkv.unflatten(0, (-1, group + 2)).split((group, 1, 1), 1)
    for weight, factor in zip(q_k_v, (1, 1, gain), strict=True):
        weight = weight.flatten(0, 2)
        assert weight.std().item() / factor == deviation_of(weight)
    first = found[layer + "mlp.linear_fc1.weight"].chunk(2 if model.swiglu else 1)
    proj, last = (
        found[layer + name]
        for name in ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
    )
    for weight in (*first, proj, last):
        assert weight.std().item() / gain == deviation_of(weight)
    assert torch.equal(
        found["embedding.word_embeddings.weight"], known["embedding.word_embeddings.weight"]
    )
    assert {name for name in found if name not in known} == {
        f"decoder.layers.{n}.{name}.norm.weight"
        for n in range(2)
        for name in ("self_attention.linear_proj", "mlp.linear_fc2")
    }


def test_parameters_are_given_away_as_soon_as_they_have_their_values(build, mesh):
    expected = [parameter.detach().clone() for _, parameter in named_parameters(build()[0])]
    given = []

    def divide(parameter):
        given.append(parameter.detach().clone())
        parameter.data = torch.empty(0)

    model = build_model(resolved(), VOCAB_SIZE, mesh, divide=divide)
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    assert not any(parameter.numel() for parameter in model.parameters())


def test_parameters_that_modules_make_on_the_device_themselves_stay(build, monkeypatch):
    """As Transformer Engine's do, for which Megatron-core names the device."""
    expected = dict(named_parameters(build()[0]))
    monkeypatch.setattr("megalong.model.build.use_transformer_engine", lambda impl: True)
    monkeypatch.setattr(torch, "empty_like", None)  # none is made a second time
    for name, parameter in named_parameters(build()[0]):
        assert torch.equal(parameter, expected[name])


class LargestOnTheHost(TorchDispatchMode):
    """Elements of the largest CPU tensor that is made in the block."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("changes", [{}, {"untie_embeddings_and_output_weights": True}])
def test_the_host_holds_nothing_of_a_model_on_another_device(mesh, changes):
    """The device stands in for a GPU; nothing can be drawn on it, so the weights have no values."""
    elsewhere = dataclasses.replace(mesh, device=torch.device("meta"))
    config = resolved(qk_layernorm=True, **changes)
    with LargestOnTheHost() as largest:
        model = build_model(config, VOCAB_SIZE, elsewhere, initialize=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert largest.elements <= config.model.kv_channels  # rotary frequencies


@pytest.mark.parametrize("changes", [{}, {"untie_embeddings_and_output_weights": True}])
def test_losses_need_no_logits(build, changes, tokens):
    """The same losses and gradients, of parameters of the same names; logits of 16 x 2 tokens."""
    found, largest = [], []
    for how in ({}, {"linear_cross_entropy": True, "loss_chunk_size": 32, "tile_size": 10}):
        model, config = build(hidden_size=32, ffn_hidden_size=32, **changes, **how)
        places = torch.arange(LENGTH)
        with LargestOnTheHost() as made:
            losses = model(tokens, places, attention_mask=None, labels=tokens.flip(1))
            losses.square().mean().backward()
        largest.append(made.elements)
        found.append({"losses": losses} | {n: p.grad for n, p in model.named_parameters()})
    rows = config.model.vocabulary_rows(VOCAB_SIZE)
    assert largest[0] == tokens.numel() * rows and largest[1] <= 128 * rows
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(3,), (7, 9), (32, 5, 3), (47,), (48,)])
def test_random_numbers_drawn_in_pieces_are_those_drawn_at_once(shape):
    pieces = normal_numbers(shape, torch.Generator().manual_seed(5), torch.device("cpu"), piece=32)
    assert torch.equal(pieces, torch.randn(shape, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize(
    "local, first_layer, name",
    [
        ("embedding.word_embeddings.weight", 0, "embedding.word_embeddings.weight"),
        ("decoder.layers.3.mlp.linear_fc1.weight", 8, "decoder.layers.11.mlp.linear_fc1.weight"),
        (
            "decoder.layers.0.mlp.linear_fc1.layer_norm_bias",
            2,
            "decoder.layers.2.pre_mlp_layernorm.bias",
        ),
    ],
)
def test_canonical_names(local, first_layer, name):
    assert canonical_name(local, first_layer) == name


def test_a_parameter_without_a_row_is_an_error():
    with pytest.raises(LookupError, match=r"no row for decoder\.layers\.3\.mlp\.router\.weight"):
        decays("decoder.layers.3.mlp.router.weight")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"untie_embeddings_and_output_weights": True, "add_qkv_bias": True, "qk_layernorm": True},
        {"no_swiglu": True, "normalization": "LayerNorm", "qk_layernorm": True},
        {"add_bias_linear": True, "kv_channels": 32, "normalization": "LayerNorm"},
        {"sub_layer_norm": True, "kv_channels": 32, "normalization": "LayerNorm"},
    ],
)
def test_the_table_has_every_parameter_with_its_shape_and_counts_them(build, changes):
    model, config = build(**changes)
    found = {name: tuple(parameter.shape) for name, parameter in named_parameters(model)}
    assert found.keys() == dict(model.chunks[0].named_parameters()).keys()  # of a whole model
    for name, parameter in named_parameters(model):
        assert torch.isfinite(parameter).all()
        expected = 0 if name.endswith("bias") else 1 if parameter.ndim == 1 else None
        assert expected is None or (parameter == expected).all()
    rows = config.model.vocabulary_rows(VOCAB_SIZE)
    assert {x.name: x.shape for x in parameters(config.model, rows)} == found
    assert all(decays(name) == (len(shape) > 1) for name, shape in found.items())
    count = count_parameters(config.model, VOCAB_SIZE)
    assert count.used + count.padding == sum(p.numel() for p in model.parameters())
    matrices = 2 if changes.get("untie_embeddings_and_output_weights") else 1
    assert count.padding == matrices * (rows - VOCAB_SIZE) * config.model.hidden_size


def test_the_tiled_layer_finds_the_parameters_of_transformer_engines_modules():
    """There a norm is a part of the matrix after it, and a bias that is not there is empty."""
    from types import SimpleNamespace as Module

    def linear(size, norm_bias=None, **norm):
        parts = {"layer_norm_bias": norm_bias} if norm else {}
        return Module(
            weight=torch.full((size, 4), float(size)), bias=torch.empty(0), **norm, **parts
        )

    layer = Module(
        input_layernorm=Module(),
        pre_mlp_layernorm=Module(),
        self_attention=Module(
            linear_qkv=linear(12, layer_norm_weight=torch.ones(4)),
            linear_proj=linear(5),
            q_layernorm=None,
            k_layernorm=Module(weight=torch.ones(2)),
        ),
        mlp=Module(
            linear_fc1=linear(16, torch.zeros(4), layer_norm_weight=torch.ones(4)),
            linear_fc2=linear(6),
        ),
    )
    attention, mlp = attention_weights(layer), mlp_weights(layer)
    assert attention.norm_weight is layer.self_attention.linear_qkv.layer_norm_weight
    assert attention.qkv_weight.shape == (12, 4) and attention.out_weight.shape == (5, 4)
    assert attention.k_norm_weight.shape == (2,) and attention.q_norm_weight is None
    assert attention.norm_bias is attention.qkv_bias is attention.out_bias is None
    assert mlp.norm_bias is layer.mlp.linear_fc1.layer_norm_bias
    assert mlp.in_weight.shape == (16, 4) and mlp.out_weight.shape == (6, 4)
    assert mlp.in_bias is mlp.out_bias is None
