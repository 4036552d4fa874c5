"""Norms in pieces, matrices of parameters, and the next token."""

import pytest
import torch

from megalong.config import ModelConfig
from megalong.hf.names import entries
from megalong.model import layer_spec as norms
from megalong.model.chunked.rows import ALONE
from megalong.model.output import NextTokens
from megalong.model.parameters import is_layer_matrix
from megalong.model.tensor_slices import holds_queries, join_matrices, split_matrices


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm])
@pytest.mark.parametrize("limit", [1, 6 * 5, 4 * 6 * 5, 7 * 6 * 5 - 1])
def test_a_norm_in_pieces_is_the_norm(kind, limit, monkeypatch):
    torch.manual_seed(0)
    norm = kind(5, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x, out_gradient = torch.randn(7, 6, 5).double().requires_grad_(), torch.randn(7, 6, 5).double()

    def run():
        out = norm(x)
        return out, *torch.autograd.grad(out, [x, *norm.parameters()], out_gradient)

    whole = run()
    calls = []
    original = kind.__mro__[2].forward
    monkeypatch.setattr(kind.__mro__[2], "forward", lambda *a: calls.append(a) or original(*a))
    monkeypatch.setattr(norms, "MOST_ELEMENTS", limit)
    pieces = run()
    assert len(calls) > 1 and all(len(x) == 1 or x.numel() <= limit for _, x in calls)
    for one, other in zip(whole[:2], pieces[:2], strict=True):  # row by row: to the last bit
        assert torch.equal(one, other)
    for one, other in zip(whole[2:], pieces[2:], strict=True):  # sums over rows, in another order
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm])
def test_up_to_the_limit_nothing_is_cut_or_copied(kind, monkeypatch):
    monkeypatch.setattr(norms, "MOST_ELEMENTS", 7 * 5)
    monkeypatch.setattr(torch, "cat", None)
    kind(5, eps=1e-5)(torch.randn(7, 5))


@pytest.mark.parametrize("swiglu", [True, False])
def test_they_are_those_of_transformers(swiglu):
    model = ModelConfig(
        num_layers=2,
        hidden_size=24,
        num_attention_heads=6,
        num_query_groups=2,
        swiglu=swiglu,
        add_bias_linear=True,
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
    ).resolve()
    counts, queries = [], 0
    for entry in entries(model, 64):
        if not is_layer_matrix(entry.name):
            assert len(entry.shape) == 1 or ".layers." not in entry.name
            continue
        whole = torch.randn(entry.shape, generator=torch.Generator().manual_seed(0))
        matrices = split_matrices(entry.name, whole, model)
        for matrix, there in zip(matrices, entry.to_huggingface(whole).values(), strict=True):
            assert torch.equal(matrix, there)
        assert torch.equal(join_matrices(entry.name, matrices, model), whole)
        counts.append(len(matrices))
        queries += holds_queries(entry.name)
    assert sorted(counts) == sorted([3, 1, 2 if swiglu else 1, 1] * 2)
    assert queries == 2


S, B, H, V = 7, 3, 8, 11


def test_of_logits_and_of_hidden_states():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    weight[9:] = 100 * hidden[4, 2]  # only fill up the vocabulary
    logits = hidden @ weight.T
    for temperature in (0.0, 1.0):
        wanted = NextTokens((6, None, 4), temperature, (1, 2, 3))
        found = wanted.of_logits(logits, ALONE, 9)
        assert torch.equal(found, wanted.of_hidden(hidden, weight, ALONE, 9))
        assert found[1] == -1 and found[[0, 2]].max() < 9
        if not temperature:
            assert found[0] == logits[6, 0, :9].argmax() and found[2] == logits[4, 2, :9].argmax()
    nowhere = NextTokens((None,) * B, 1.0, (0,) * B)
    assert (nowhere.of_logits(logits, ALONE, V) == -1).all()


def test_draws_are_of_the_softmax():
    """4,000 of them; the same seed draws the same."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0]).expand(1, 4000, 4)
    for temperature in (0.5, 2.0):
        wanted = NextTokens((0,) * 4000, temperature, tuple(range(4000)))
        found = wanted.of_logits(logits, ALONE, 4)
        shares = found.bincount(minlength=4) / 4000
        torch.testing.assert_close(
            shares, (logits[0, 0] / temperature).softmax(0), atol=0.03, rtol=0
        )
        assert torch.equal(found, wanted.of_logits(logits, ALONE, 4))
