"""Losses in chunks of rows are those of whole logits, and so are their gradients; the likeliest
tokens are torch.argmax's."""

import pytest
import torch
import torch.nn.functional as F

from megalong.model.chunked.cross_entropy import (
    differentiate_logits_,
    is_likeliest,
    linear_cross_entropy,
    linear_is_likeliest,
    read_logits_,
)
from tests.chunked.cases import logits_case, read
from tests.forked import run_ranks

WORKER = __file__.replace("test_", "linear_").replace(".py", "_worker.py")


def made(rows, batch, hidden, vocabulary, dtype=torch.float64):
    """Hidden states, weight, labels, gradients of the losses; the numbers fit 16 bits."""
    torch.manual_seed(0)
    x = torch.randn(rows, batch, hidden).bfloat16().to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden).bfloat16().to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (batch, rows)).T  # as they come: not contiguous
    return x, weight, labels, torch.randn(rows, batch).double()


def plain(x, weight, labels):
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def gradients(losses, inputs, grad):
    return torch.autograd.grad(losses, inputs, grad.to(losses.dtype))


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 5, 2), (23, 2, 8, 50)], ids=str)
def test_chunks_compute_what_whole_logits_do(shape, chunk_size):
    x, weight, labels, grad = made(*shape)
    losses = linear_cross_entropy(x, weight, labels, chunk_size=chunk_size)
    expected = plain(x, weight, labels)
    assert_close(losses, expected)
    assert_close(gradients(losses, [x, weight], grad), gradients(expected, [x, weight], grad))
    for of_losses in (grad, torch.zeros_like(grad)):
        both = linear_cross_entropy(x, weight, labels, chunk_size=chunk_size, with_logsumexp=True)
        expected = torch.stack((plain(x, weight, labels), F.linear(x, weight).logsumexp(-1)))
        assert_close(both, expected)
        slopes = torch.stack((of_losses, torch.randn_like(grad)))
        assert_close(gradients(both, [x, weight], slopes), gradients(expected, [x, weight], slopes))


def test_logits_far_from_zero():
    x = torch.tensor([[[300.0]]], requires_grad=True)
    weight = torch.tensor([[-10.0], [10.0]])
    for label, loss in ((0, 6000.0), (1, 0.0)):
        assert linear_cross_entropy(x, weight, torch.tensor([[label]]), chunk_size=1) == loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_in_16_bits_nothing_is_worse_than_with_whole_logits(dtype, scale):
    """Against float64. The losses are float32, and their error is that of float32."""
    x, weight, labels, grad = made(200, 2, 64, 500, dtype)
    weight = (weight.detach() * scale).requires_grad_()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = plain(exact_x, exact_weight, labels)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses = linear_cross_entropy(x, weight, labels, chunk_size=33)
    assert sorted(t.numel() for t in kept) == [400, 400, 400 * 64, 500 * 64]
    whole = plain(x, weight, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    truth = gradients(exact, [exact_x, exact_weight], grad)
    chunked, plainly = (gradients(some, [x, weight], grad) for some in (losses, whole))
    for exactly, one, other in zip(truth, chunked, plainly, strict=True):
        # Small logits lose nothing in 16 bits; what is left is the rounding of the result.
        assert (one - exactly).norm() <= 1.005 * (other - exactly).norm()


@pytest.mark.parametrize("seed", range(5))
def test_a_slice_of_the_vocabulary(seed):
    x, labels, first, grad = logits_case(seed)
    *expected, labelled = read(x, labels, first)
    lse = expected[0] + 0.5  # of a whole vocabulary
    slope = ((x - lse[:, None]).exp() - labelled) * grad[:, None]
    assert_close(read_logits_(x.clone(), labels, first), tuple(expected))
    narrow = differentiate_logits_(x.clone(), labels, lse, grad, first, dtype=torch.float32)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, slope.float())
    assert differentiate_logits_(x, labels, lse, grad, first, dtype=x.dtype) is x
    assert_close(x, slope)


def test_logits_that_are_not_side_by_side_are_refused():
    x, row = torch.zeros(4, 3).T, torch.zeros(3)
    with pytest.raises(ValueError):
        read_logits_(x, row.long())
    with pytest.raises(ValueError):
        differentiate_logits_(x, row.long(), row, row, dtype=x.dtype)


def test_a_vocabulary_cut_over_ranks():
    """2 and 4 tensor-parallel ranks against one, that divide the rows or do not."""
    run_ranks(4, WORKER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_of_logits_with_many_ties(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (13, 2, 11), generator=generator).to(dtype)
    likeliest = logits.argmax(-1)
    assert is_likeliest(logits, likeliest).all()
    assert not any(is_likeliest(logits, (likeliest + other) % 11).any() for other in range(1, 11))


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_rows_that_fill_up_the_vocabulary_are_never_the_likeliest(chunk_size):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.rand(13, 2, 8, generator=generator, requires_grad=True)  # positive
    weight = torch.randn(11, 8, generator=generator)
    weight[7:] = 10.0
    logits = hidden @ weight.T
    assert (logits.argmax(-1) == 7).all()
    labels = logits[..., :7].argmax(-1)
    for used_rows, right in ((7, True), (8, False), (None, False)):
        how = {"chunk_size": chunk_size, "used_rows": used_rows}
        found = linear_is_likeliest(hidden, weight, labels, **how)
        assert (found == right).all() and not found.requires_grad
        assert torch.equal(found, is_likeliest(logits, labels, used_rows=used_rows))
