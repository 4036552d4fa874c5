"""What Transformers does with a model: padding, batches, generation, beams, training."""

import pytest
import torch
from transformers import DynamicCache

from megalong.attention.passes import attend
from megalong.attention.pattern import DilatedPattern
from megalong.attention.reference import dilated_attention_reference
from megalong.config import AttentionConfig
from megalong.config.attention import PATTERN_FIELDS
from megalong.hf.attention_longnet import probabilities
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.evaluation import token_losses
from megalong.hf.loaded_model import LoadedModel
from megalong.hf.modeling_longnet import LongNetForCausalLM
from megalong.hf.parts_longnet import parts_of
from megalong.utils.errors import UserError

SEGMENTS = {"segment_lengths": [8, 16, 24], "dilation_rates": [1, 2, 5]}


def make_model(**changes):
    torch.manual_seed(0)
    fields = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": None,
        **SEGMENTS,
    }
    return LongNetForCausalLM(LongNetConfig(**fields | changes)).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


def sequences(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 50, (n,), generator=generator) for n in lengths]


def batch_of(rows, sides):
    """Rows of one length, padded on their sides, and the mask."""
    width = max(map(len, rows)) + 3
    tokens, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, (row, side) in enumerate(zip(rows, sides, strict=True)):
        start = {"left": width - len(row), "right": 0, "both": 2}[side]
        tokens[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return tokens, mask.long()


@torch.no_grad()
def logits(model, tokens, **options):
    return model(tokens, **options).logits


def test_a_padded_row_equals_the_unpadded_one(model):
    rows = sequences(61, 7, 40, 24)
    tokens, mask = batch_of(rows, ["left", "right", "both", "left"])
    padded = logits(model, tokens, attention_mask=mask)
    for i, row in enumerate(rows):
        alone = logits(model, row[None])[0]
        torch.testing.assert_close(padded[i][mask[i].bool()], alone, rtol=0, atol=1e-5)
    assert torch.isfinite(padded).all()


def test_masks_and_caches_of_another_kind_are_refused(model):
    tokens = sequences(5)[0][None]
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(tokens, attention_mask=torch.ones(1, 1, 5, 5))
    with pytest.raises(ValueError, match="its own cache"):
        model(tokens, cache=DynamicCache())
    with pytest.raises(TypeError, match="token_type_ids"):
        model(tokens, token_type_ids=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="head_offsets"):
        make_model(head_offsets="modulo")


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
YARN |= {"original_max_position_embeddings": 12}
VARIANTS = [
    {},
    {"head_offsets": "block", "num_key_value_heads": 1},
    {"head_offsets": "layer", "position_embedding_type": "none"},
    {"attention": "dense", "normalization": "LayerNorm", "swiglu": False, "linear_bias": True},
    {"segment_lengths": [7, 20], "dilation_rates": [2, 9]},  # a query may see nothing
    {"attention": "local", "window_size": 11, "sub_layer_norm": True},
    {"position_embedding_type": "xpos", "xpos_scale_base": 30, "sub_layer_norm": True},
    {"rope_parameters": YARN, "qk_norm": True},
    {"attention": ["local", "sparse"], "sparse_block_size": 9, "sparse_columns": 2},
    {"attention": ["dense", "sparse"], "sparse_block_size": 6, "sparse_columns": 4},
]
SIZES = [[1] * 100, [13] * 8, [40, 1, 1, 1, 30, 1, 26, 1, 1], [5, 1, 1, 3, 1, 1, 1, 1, 10, 1, 75]]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=["ones", "chunks", "mixed", "turns"])
def test_cached_equals_uncached(changes, sizes):
    """Over more than three times the longest segment, one token or many at a time."""
    model = make_model(**changes).double()
    tokens = torch.stack(sequences(sum(sizes), sum(sizes)))
    expected, cache, found = logits(model, tokens), None, []
    for chunk in tokens.split(sizes, 1):
        with torch.no_grad():
            outputs = model(chunk, cache=cache, use_cache=True)
        cache = outputs.cache
        found.append(outputs.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-10)
    assert cache.get_seq_length() == sum(sizes)


def test_xpos_goes_on_past_the_training_as_far_as_its_scales_reach():
    """What follows is the same wherever it stands, but for the tokens before it that decay."""
    fields = {"position_embedding_type": "xpos", "attention": "local", "window_size": 9}
    model = make_model(**fields, xpos_scale_base=20, num_hidden_layers=1)
    tokens = torch.stack(sequences(900))
    found = logits(model, tokens)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:, 800:], logits(model, tokens[:, 700:])[:, 100:])
    with pytest.raises(ValueError, match=r"no room for 1000 tokens in float32: give at most 953$"):
        logits(model, torch.stack(sequences(1000)))
    loaded = LoadedModel(model, encode=None, decode=None, first=1)
    for longer in (
        lambda: token_losses(loaded, [1] * 1001),
        lambda: loaded.check_length(1000),
    ):
        with pytest.raises(UserError, match="no room for 1000 tokens"):
            longer()
    with pytest.raises(ValueError, match=r"600 tokens in float16: load it in bfloat16"):
        logits(model.half(), tokens[:, :600])


@pytest.mark.parametrize("chunk", [1, 9, 60])
def test_cached_equals_uncached_with_padding(chunk):
    model = make_model().double()
    tokens, mask = batch_of(sequences(61, 7, 40), ["left", "left", "both"])
    extra = torch.stack(sequences(30, 30, 30))
    tokens = torch.cat((tokens, extra), 1)
    mask = torch.cat((mask, torch.ones_like(extra)), 1)
    expected, cache, found = logits(model, tokens, attention_mask=mask), None, []
    for start in range(0, tokens.shape[1], chunk):
        stop = min(start + chunk, tokens.shape[1])
        with torch.no_grad():
            outputs = model(
                tokens[:, start:stop], attention_mask=mask[:, :stop], cache=cache, use_cache=True
            )
        cache = outputs.cache
        found.append(outputs.logits)
    found, real = torch.cat(found, 1), mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)
    assert cache.lengths == mask.sum(1).tolist()


@torch.no_grad()
def test_the_cache_of_a_layer_has_the_rows_of_its_kind():
    fields = {"attention": ("dilated", "local", "sparse", "dense"), "window_size": 10}
    fields |= {"sparse_block_size": 12, "sparse_columns": 3}
    model = make_model(num_hidden_layers=4, **fields)
    config = AttentionConfig(**fields, **SEGMENTS).resolve(512)
    cache, done = model.model.new_cache(), 0
    for chunk in sequences(200)[0][None].split([57, 43, 29, *[1] * 71], 1):
        model(chunk, cache=cache)
        done += chunk.shape[1]
        rows = [layer.rows() for layer in cache.layers]
        most = [config.pattern(layer).cached_rows(done, heads=4, kv_heads=2) for layer in range(4)]
        spare = 0
        if chunk.shape[1] > 1:
            assert rows[1:] == [10, done % 12 + 3 * -(-done // 12), done]
        else:  # what grows gets room for an eighth more
            assert rows[1] == 10
            spare = done // 8 + 20
        assert all(found <= limit // 2 + spare for found, limit in zip(rows, most, strict=True))


GREEDY = {"do_sample": False, "max_new_tokens": 80}


def test_generation_with_a_cache_equals_generation_without(model):
    tokens, mask = batch_of(sequences(20, 33), ["left", "left"])
    inputs = {"input_ids": tokens, "attention_mask": mask, **GREEDY}
    expected = model.generate(**inputs, use_cache=False)
    assert expected.shape[1] > 4 * 24
    assert torch.equal(model.generate(**inputs), expected)
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=10), expected)
    alone = model.generate(tokens[:1, -20:], **GREEDY)
    assert torch.equal(alone[0, 20:], expected[0, tokens.shape[1] :])


def test_beam_search_and_sampling(model):
    tokens, mask = batch_of(sequences(20, 33), ["left", "left"])
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 30}
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    expected = model.generate(**inputs, **beams, use_cache=False)
    assert torch.equal(model.generate(**inputs, **beams), expected)
    torch.manual_seed(0)
    sampled = model.generate(**inputs, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (4, tokens.shape[1] + 30)


def test_a_loss_and_its_gradient_do_not_feel_padding_or_checkpointing():
    rows = sequences(50, 20)
    tokens, mask = batch_of(rows, ["right", "left"])
    labels = torch.where(mask.bool(), tokens, -100)
    labels[1, -20] = -100  # nothing real stands before it
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed) and plain.abs().sum() > 0
    sums = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows]
    torch.testing.assert_close(loss, sum(sums) / (len(rows[0]) - 1 + len(rows[1]) - 1))


def passes_of(config, layer):
    """What computes a layer's attention in training."""
    fields = {name: getattr(config, name) for name in PATTERN_FIELDS}
    attention = AttentionConfig(**fields | {"attention": config.kind(layer)})
    return attention.kind(0).passes_class()(attention.pattern(layer))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_attentions_are_those_of_the_definition(changes):
    config = make_model(**changes).config
    kv_heads, s = config.num_key_value_heads, 50
    q, k = (torch.randn(1, s, heads, s, dtype=torch.float64) for heads in (4, kv_heads))
    v = torch.eye(s, dtype=torch.float64)[:, None].expand(1, s, kv_heads, s)  # out: the weights
    if config.kind(1) == "dilated":
        fields = config.segment_lengths, config.dilation_rates, config.head_offsets
        expected = dilated_attention_reference(q, k, v, DilatedPattern(*fields, layer=1))[0]
    else:
        expected = attend(q, k, v, passes_of(config, 1))
    expected = expected.transpose(1, 2)
    weights = probabilities(q, k, parts_of(config, 1), True, [s])
    torch.testing.assert_close(weights, expected)
    assert torch.equal(weights == 0, expected == 0)


def test_attentions_of_padded_rows_are_what_the_model_computes_with():
    model = make_model(attn_implementation="eager").double()
    attention, seen = model.model.layers[1].self_attn, {}
    attention.v_proj.register_forward_hook(lambda *call: seen.update(values=call[2]))
    attention.o_proj.register_forward_pre_hook(lambda _, inputs: seen.update(out=inputs[0]))
    tokens, mask = batch_of(sequences(50, 30), ["right", "both"])
    with torch.no_grad():
        attentions = model(tokens, attention_mask=mask, output_attentions=True).attentions
    real = mask.bool()
    assert [x.shape for x in attentions] == [(2, 4, 53, 53)] * 2
    for row, count in enumerate((50, 30)):
        weights = attentions[1][row]
        assert not weights[:, ~real[row]].any() and not weights[..., ~real[row]].any()
        v = seen["values"][row, :count].unflatten(-1, (2, 8)).transpose(0, 1)
        out = weights[:, real[row]][..., real[row]] @ v.repeat_interleave(2, 0)
        torch.testing.assert_close(out.transpose(0, 1).flatten(1), seen["out"][row, :count])


def test_attentions_without_all_of_the_past_are_refused(model):
    tokens = sequences(5)[0][None]
    assert model(tokens).attentions is None
    with pytest.raises(ValueError, match=r"output_attentions .* use_cache=False"):
        model.generate(tokens, output_attentions=True, max_new_tokens=2)
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    steps = model.generate(tokens, **options, use_cache=False).attentions
    assert [step[0].shape for step in steps] == [(1, 4, 5, 5), (1, 4, 6, 6)]
