"""Documents that share a row see each other in Transformers as little as in the training."""

from itertools import pairwise

import pytest
import torch

from megalong.hf import modeling_longnet
from megalong.hf.attention_longnet import attention, bidirectional_attention, probabilities
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.parts_longnet import parts_of
from megalong.hf.positions_longnet import Documents
from megalong.parallel import launch
from tests.hf.models import VOCAB_SIZE, pair, random_tokens, resolved
from tests.hf.test_masked_lm import masked_model

EOD = 256
BORDERS = [[0, 1, 40, 41, 42, 90], [0, 17, 64, 127]]  # of two rows of 128 tokens


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with launch(resolved()) as mesh:
        yield mesh


def starts_and_stops(length=128):
    """int64 (2, length) each."""
    found = torch.zeros(2, 2, length, dtype=torch.long)
    for row, borders in enumerate(BORDERS):
        for first, stop in pairwise([*borders, length]):
            found[:, row, first:stop] = torch.tensor([[first], [stop]])
    return found.unbind()


def packed_tokens():
    """Rows of documents that end with the token for it, and have no other."""
    tokens, (_, stops) = random_tokens(2, 128) % EOD, starts_and_stops()
    return torch.where(torch.arange(128) + 1 == stops, EOD, tokens)


LADDERS = {"segment_lengths": "16 32 64", "dilation_rates": "1 2 3"}
CASES = [
    LADDERS | {"num_query_groups": 1, "head_offsets": "block", "document_attention": "isolated"},
    {"segment_lengths": "50 100", "dilation_rates": "3 7", "position_embedding_type": "xpos",
     "xpos_scale_base": 30, "document_attention": "isolated"},
    LADDERS | {"attention": "local dilated dense sparse", "num_layers": 4, "window_size": 30,
               "sparse_block_size": 20, "sparse_columns": 3, "document_attention": "isolated"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CASES, ids=["dilated", "holes", "all kinds"])
@torch.no_grad()
def test_logits_equal_megatrons(changes, mesh, monkeypatch):
    """By the ends of documents, by positions, through the cache in pieces, padded, and in tiles."""
    ours, theirs = pair(mesh, **changes)
    tokens, (starts, _) = packed_tokens(), starts_and_stops()
    expected = ours(
        input_ids=tokens,
        position_ids=torch.arange(128),
        attention_mask=None,
        document_start=starts.int(),
    )[..., :VOCAB_SIZE]
    assert expected.std() > 0.5
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(theirs(tokens, use_cache=False).logits, expected, **close)
    cache, logits = theirs.model.new_cache(), []
    for piece in tokens.split([39, 1, 1, 1, 1, 1, 60, 24], 1):
        logits.append(theirs(piece, cache=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **close)
    padded = torch.nn.functional.pad(tokens, (5, 2), value=EOD)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (5, 2))
    logits = theirs(padded, attention_mask=mask, use_cache=False).logits[:, 5:-2]
    torch.testing.assert_close(logits, expected, **close)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_longnet, "TILE", 13)
        torch.testing.assert_close(theirs(tokens, use_cache=False).logits, expected, **close)

    theirs.config.document_attention = "mixed"
    positions = torch.arange(128) - starts
    logits = theirs(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, expected, **close)
    assert (theirs(tokens, use_cache=False).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("changes", CASES[::2], ids=["dilated", "all kinds"])
@torch.no_grad()
def test_masked_logits_equal_megatrons(changes, mesh):
    ours, theirs = masked_model(mesh, **changes)
    tokens, (starts, stops) = packed_tokens(), starts_and_stops()
    expected = ours(
        input_ids=tokens,
        position_ids=torch.arange(128),
        attention_mask=None,
        document_start=starts.int(),
        document_stop=stops.int(),
    )[..., :VOCAB_SIZE]
    logits = theirs(tokens).logits[..., :VOCAB_SIZE]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    theirs.config.document_attention = "mixed"
    logits = theirs(tokens, position_ids=torch.arange(128) - starts).logits[..., :VOCAB_SIZE]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


PARTS = (
    {"segment_lengths": [8, 20, 40], "dilation_rates": [1, 3, 7], "head_offsets": "block"},
    {"attention": "local", "window_size": 7},
    {"attention": "sparse", "sparse_block_size": 9, "sparse_columns": 2},
)


@pytest.mark.parametrize("fields", PARTS, ids=["dilated", "local", "sparse"])
def test_attention_is_what_the_probabilities_say(fields):
    """Of every position to every other, from some place on, both ways too; float64."""
    config = LongNetConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, **fields)
    parts, counts = parts_of(config, 0), [128, 128]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 128, heads, 8, dtype=torch.float64, generator=generator)
        for heads in (4, 2, 2)
    )
    starts, stops = starts_and_stops()

    def check(out, weights):
        expected = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        same = (starts[:, :, None] == starts[:, None])[:, None]
        assert (weights * ~same).abs().max() == 0

    weights = probabilities(q, k, parts, True, counts, Documents(starts, None, []))
    check(attention(q, k, v, parts, first_bs=starts)[0], weights)
    past, out, at = None, [], 0
    for size in (41, 1, 50, 36):
        here = slice(at, at + size)
        new = (x[:, here] for x in (q, k, v))
        attended, past = attention(*new, parts, at, past, starts[:, here])
        out.append(attended)
        at += size
    check(torch.cat(out, 1), weights)
    both = Documents(starts, stops, [])
    weights = probabilities(q, k, parts, False, counts, both)
    check(bidirectional_attention(q, k, v, parts, counts, both), weights)


@torch.no_grad()
def test_generation_goes_on_with_the_last_document(mesh):
    """Of several rows, one of which begins a document with its next token; as without a cache."""
    _, model = pair(mesh, **CASES[0])
    tokens = packed_tokens()[:, :90]  # the first row ends with the end of a document
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(tokens, num_beams=2, **options)
    assert torch.equal(found, model.generate(tokens, num_beams=2, use_cache=False, **options))
    assert torch.equal(found, model.generate(tokens, num_beams=2, prefill_chunk_size=7, **options))
    model.config.document_attention = "mixed"
    positions = (torch.arange(128) - starts_and_stops()[0])[1:, :90]
    by_position = model.generate(tokens[1:], position_ids=positions, **options)
    model.config.document_attention = "isolated"
    assert torch.equal(by_position, model.generate(tokens[1:], **options))
    mask = torch.ones_like(tokens)
    tokens[1, :30] = mask[1, :30] = 0
    with_padding = model.generate(tokens, attention_mask=mask, **options)[1, 30:]
    assert torch.equal(with_padding, model.generate(tokens[1:, 30:], **options)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_layers_spread_over_devices(grad, mesh):
    """accelerate, behind device_map="auto", moves to the device of a layer what it is called with:
    here to the one of tensors without numbers."""
    hooks = pytest.importorskip("accelerate.hooks")
    _, model = pair(mesh, **CASES[0])
    for module in (model.model.layers[1], model.model.norm, model.lm_head):
        module.to("meta")
        hook = hooks.AlignDevicesHook(execution_device="meta", io_same_device=False)
        hooks.add_hook_to_module(module, hook)
    with torch.set_grad_enabled(grad):
        assert model(packed_tokens(), use_cache=False).logits.is_meta


def test_positions_that_mean_something_else_are_refused(mesh):
    _, model = pair(mesh)
    with pytest.raises(ValueError, match="position_ids must go up by one"):
        model(random_tokens(1, 4), position_ids=torch.tensor([[0, 2, 4, 6]]))
    for positions in (torch.arange(5)[None], torch.arange(4).expand(3, 4)):
        with pytest.raises(ValueError, match=r"position_ids must be \(2, 4\), as the input is, or"):
            model(random_tokens(2, 4), position_ids=positions)
    model.config.document_attention = "isolated"
    embeddings = model.get_input_embeddings()(random_tokens(1, 4))
    with pytest.raises(ValueError, match="embeddings do not say where they end"):
        model(inputs_embeds=embeddings)
    model(inputs_embeds=embeddings, position_ids=torch.arange(4)[None])
    with pytest.raises(ValueError, match="document_attention must be one of mixed, isolated"):
        LongNetConfig(document_attention="apart")
