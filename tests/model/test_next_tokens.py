"""The next token, greedy or drawn; over ranks test_parity.py."""

import torch

from megalong.model.chunked.rows import ALONE
from megalong.model.output import NextTokens

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
