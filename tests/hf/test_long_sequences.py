"""A long sequence takes the memory of its hidden states, and gives what a short one would."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.hf import attention_longnet, evaluation, modeling_longnet
from megalong.hf.loaded_model import LoadedModel
from megalong.hf.modeling_longnet import next_token_loss
from tests.forked import REPOSITORY, run_ranks
from tests.hf.test_transformers import batch_of, make_model, sequences

EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 13 positions, chunks of 7 rows of 50 logits."""
    monkeypatch.setattr(modeling_longnet, "TILE", 13)
    monkeypatch.setattr(evaluation, "CHUNK", 13)
    monkeypatch.setattr(modeling_longnet, "CHUNK_LOGITS", 7 * 50 + 3)


def plain_loss(logits, labels, items=None):
    """ForCausalLMLoss, in the dtype of the logits."""
    reduction = "mean" if items is None else "sum"
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, reduction=reduction) / (items or 1)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_loss_in_chunks_is_the_plain_one(small_tiles, items, ignored, bias):
    torch.manual_seed(0)
    for shape in ((1, 2), (1, 30), (3, 7), (2, 40)):
        head = torch.nn.Linear(6, 50, bias=bias, dtype=torch.float64)
        hidden = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
        labels = torch.randint(50, shape).masked_fill(torch.rand(shape) < ignored, -100)
        inputs = [hidden, *head.parameters()]
        expected = plain_loss(head(hidden), labels, items)
        loss = next_token_loss(head, hidden, labels, 50, items)
        torch.testing.assert_close(loss, expected, **EXACT, equal_nan=True)
        found, wanted = (torch.autograd.grad(x * 3, inputs) for x in (loss, expected))
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_in_many_chunks_rounds_like_the_plain_one(monkeypatch, autocast):
    """A sum of the chunks' gradients in bfloat16 would be 15 times as far off."""
    monkeypatch.setattr(modeling_longnet, "CHUNK_LOGITS", 50)  # a chunk of one row
    torch.manual_seed(0)
    exact = torch.nn.Linear(16, 50, bias=False, dtype=torch.bfloat16).double()
    hidden = (torch.randn(1, 300, 16) + 1).bfloat16()
    labels = torch.randint(5, (1, 300))

    def gradient(head, loss_of):
        loss_of(head).backward()
        return head.weight.grad.double()

    def chunked(head):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return next_token_loss(head, hidden, labels, 50)

    def plain(head):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return plain_loss(head(hidden).float(), labels)

    true = gradient(exact, lambda head: plain_loss(head(hidden.double()), labels))
    errors = []
    for loss_of in (chunked, plain):
        head = torch.nn.Linear(16, 50, bias=False)
        head.load_state_dict(exact.state_dict())
        head = head if autocast else head.bfloat16()
        errors.append((gradient(head, loss_of) - true).norm() / true.norm())
    assert errors[0] < 1.05 * errors[1] < 0.002


def test_a_models_loss_and_gradients_in_chunks(small_tiles, monkeypatch):
    rows = sequences(50, 21)
    tokens, mask = batch_of(rows, ["right", "left"])
    labels = torch.where(mask.bool(), tokens, -100)
    labels[0, 20:31] = -100
    labels[1, -21] = -100  # nothing real stands before it
    model = make_model(tie_word_embeddings=False).double()
    expected = plain_loss(model(tokens, attention_mask=mask).logits, labels)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    monkeypatch.setattr(modeling_longnet, "MANY_LOGITS", 2 * tokens.shape[1] * 50 - 1)
    for keep, kept in ((None, 0), (1, 1), (torch.tensor([5, 2]), 2)):
        outputs = model(tokens, attention_mask=mask, labels=labels, logits_to_keep=keep)
        assert outputs.logits.shape == (2, kept, 50)
        torch.testing.assert_close(outputs.loss, expected, **EXACT)
        found = torch.autograd.grad(outputs.loss, list(model.parameters()))
        torch.testing.assert_close(found, gradients, **EXACT)
        with torch.no_grad():
            outputs = model(tokens, attention_mask=mask, labels=labels, logits_to_keep=keep)
        torch.testing.assert_close(outputs.loss, expected.detach(), **EXACT)
    asked = model(tokens, attention_mask=mask, labels=labels, logits_to_keep=0)
    assert asked.logits.shape == (*tokens.shape, 50)
    model.loss_function = lambda logits, labels, vocab_size: logits.sum()
    own = model(tokens, attention_mask=mask, labels=labels)
    assert own.logits.shape == (*tokens.shape, 50) and own.loss == own.logits.sum()


def test_a_loss_in_chunks_under_zero_3():
    run_ranks(2, str(REPOSITORY / "tests" / "hf" / "zero3_loss_worker.py"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_offsets": "layer", "position_embedding_type": "none"},
        {"attention": "dense", "normalization": "LayerNorm", "swiglu": False, "linear_bias": True},
        {"segment_lengths": [7, 20], "dilation_rates": [2, 9]},  # a query may see nothing
    ],
    ids=str,
)
def test_tiles_of_a_sequence_are_the_whole_one(changes, small_tiles):
    model = make_model(**changes).double()
    tokens, mask = batch_of(sequences(105, 40, 7), ["left", "right", "both"])
    real = mask.bool()
    whole = model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
    with torch.no_grad():
        tiled, cached = (
            model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=use_cache)
            for use_cache in (False, True)
        )
        more = torch.stack(sequences(30, 30, 30))
        after = model(
            more, attention_mask=torch.cat((mask, torch.ones_like(more)), 1), cache=cached.cache
        )
    assert tiled.cache is None and cached.cache.lengths == [105 + 30, 40 + 30, 7 + 30]
    for outputs in (tiled, cached):
        torch.testing.assert_close(outputs.logits[real], whole.logits[real], **EXACT)
        for found, expected in zip(outputs.hidden_states, whole.hidden_states, strict=True):
            torch.testing.assert_close(found[real], expected[real], **EXACT)
    row = torch.cat((tokens[1:2, :40], more[1:2]), 1)
    torch.testing.assert_close(after.logits[1], model(row).logits[0, 40:], **EXACT)


@pytest.mark.parametrize("chunk", [None, 9, 60, 1000])
def test_a_long_prompt_is_read_in_chunks(small_tiles, chunk):
    """Of one sequence, and of a batch with padding on the left; beyond three times the longest
    segment, which chunks and tiles need not fit."""
    model = make_model().double()
    tokens, mask = batch_of(sequences(90, 33), ["left", "left"])
    inputs = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    outputs = model.generate(
        **inputs, prefill_chunk_size=chunk, output_logits=True, return_dict_in_generate=True
    )
    rows = [model(outputs.sequences[i, 3 + 90 - n :][None]).logits[0, n - 1 : -1]
            for i, n in enumerate((90, 33))]  # fmt: skip
    found, expected = torch.stack(outputs.logits, 1), torch.stack(rows).float()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-7)  # Transformers rounds them


def loaded_model(**changes):
    model = make_model(vocab_size=257, **changes)
    return LoadedModel(model, lambda text: list(text.encode()), bytes_of, first=256)


def bytes_of(tokens):
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


@pytest.mark.parametrize("attention", ["dilated", "dense"])
def test_an_evaluation_reads_in_chunks(small_tiles, attention):
    loaded, heard = loaded_model(attention=attention), []
    tokens = [256, *range(100)]
    logits = loaded.model(torch.tensor([tokens[:-1]])).logits
    expected = F.cross_entropy(logits[0], torch.tensor(tokens[1:]), reduction="none")
    losses = evaluation.token_losses(loaded, tokens, heard.append)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-5, atol=1e-5)
    assert heard == ([13] * 7 + [9] if attention == "dilated" else [100])
    heard.clear()
    evaluation.passkey(loaded, 300, 0.5, trials=2, on_tokens=heard.append)
    assert sum(heard) == 2 * 299


class Largest(TorchDispatchMode):
    """The most elements that a tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_is_out_of_proportion(monkeypatch):
    """None is larger than the hidden states where gradients are not asked for, none has the logits
    of all positions where they are; and of an evaluation, none grows with the length."""
    length, hidden, vocab_size = 1024, 32, 800
    for module, name, value in (
        (modeling_longnet, "TILE", 64),
        (modeling_longnet, "MANY_LOGITS", 2**19),
        (attention_longnet, "TILE_SCORES", 2**14),
        (modeling_longnet, "CHUNK_LOGITS", 2**15),
        (evaluation, "CHUNK", 64),
        (evaluation, "LOGIT_ROWS", 16),
    ):
        monkeypatch.setattr(module, name, value)
    model = make_model(
        vocab_size=vocab_size, segment_lengths=[64, 256, 1024], dilation_rates=[1, 4, 16]
    )
    tokens = torch.randint(vocab_size, (1, length))
    most = length * hidden
    with Largest() as seen, torch.no_grad():
        model(tokens, labels=tokens)
    assert seen.elements == most
    with Largest() as seen:
        model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert seen.elements == most
    with Largest() as seen:
        model.generate(tokens, max_new_tokens=3, do_sample=False, prefill_chunk_size=64)
    assert seen.elements <= vocab_size * hidden  # the weight, or a tile's keys
    with Largest() as seen:
        evaluation.token_losses(LoadedModel(model, None, None, 0), tokens[0].tolist())
    assert seen.elements <= vocab_size * hidden
    with Largest() as seen:
        model(tokens, labels=tokens).loss.backward()
    assert seen.elements < length * vocab_size / 8
