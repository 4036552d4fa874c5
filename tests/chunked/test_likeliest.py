"""Whether a label is the likeliest token, against torch.argmax; over ranks
linear_cross_entropy_worker.py."""

import pytest
import torch

from megalong.model.chunked.likeliest import is_likeliest, linear_is_likeliest

S, B, H, V = 13, 2, 8, 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_argmax_ties_too(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (S, B, V), generator=generator).to(dtype)  # with many ties
    likeliest = logits.argmax(-1)
    assert is_likeliest(logits, likeliest).all()
    for other in range(1, V):
        assert not is_likeliest(logits, (likeliest + other) % V).any()


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_in_chunks_without_all_logits(chunk_size):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(S, B, H, generator=generator, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, requires_grad=True)
    labels = (hidden @ weight.T).argmax(-1)
    labels[::2] = torch.randint(0, V, labels[::2].shape, generator=generator)
    right = linear_is_likeliest(hidden, weight, labels, chunk_size=chunk_size)
    assert torch.equal(right, is_likeliest(hidden @ weight.T, labels)) and not right.requires_grad
    assert right[1::2].all() and 0 < right[::2].sum() < right[::2].numel()


def test_rows_that_fill_up_the_vocabulary_are_never_the_likeliest():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(S, B, H, generator=generator)  # positive
    weight = torch.randn(V, H, generator=generator)
    weight[7:] = 10.0
    logits = hidden @ weight.T
    assert (logits.argmax(-1) == 7).all()
    labels = logits[..., :7].argmax(-1)
    for used_rows, right in ((7, True), (8, False), (None, False)):
        assert (is_likeliest(logits, labels, used_rows=used_rows) == right).all()
        found = linear_is_likeliest(hidden, weight, labels, chunk_size=5, used_rows=used_rows)
        assert (found == right).all()
