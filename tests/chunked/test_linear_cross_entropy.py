"""Losses in chunks of rows are those of whole logits, and so are their gradients."""

import pytest
import torch
import torch.nn.functional as F

from megalong.model.chunked.cross_entropy import differentiate_logits_, read_logits_
from megalong.model.chunked.linear_cross_entropy import linear_cross_entropy
from tests.chunked.cases import logits_case, read
from tests.forked import run_ranks

WORKER = __file__.replace("test_linear", "linear").replace(".py", "_worker.py")


def made(rows, batch, hidden, vocabulary, dtype=torch.float64):
    """Hidden states, weight, labels, gradients of the losses; the numbers fit 16 bits."""
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


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 1, 8, 30), (1, 3, 5, 2), (16, 1, 4, 9), (23, 2, 8, 50)], ids=str
)
def test_chunks_compute_what_whole_logits_do(shape, chunk_size):
    torch.manual_seed(0)
    x, weight, labels, grad = made(*shape)
    losses = linear_cross_entropy(x, weight, labels, chunk_size=chunk_size)
    expected = plain(x, weight, labels)
    assert_close(losses, expected)
    assert_close(gradients(losses, [x, weight], grad), gradients(expected, [x, weight], grad))


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_logsumexp_is_that_of_whole_logits(chunk_size):
    torch.manual_seed(0)
    x, weight, labels, grad = made(23, 2, 8, 50)
    for of_losses in (grad, torch.zeros_like(grad)):
        both = linear_cross_entropy(x, weight, labels, chunk_size=chunk_size, with_logsumexp=True)
        expected = torch.stack((plain(x, weight, labels), F.linear(x, weight).logsumexp(-1)))
        assert_close(both, expected)
        slopes = torch.stack((of_losses, torch.randn_like(grad)))
        assert_close(gradients(both, [x, weight], slopes), gradients(expected, [x, weight], slopes))


def test_tokens_without_a_share_in_the_loss_have_no_gradient():
    torch.manual_seed(0)
    x, weight, labels, grad = made(9, 2, 4, 11)
    losses = linear_cross_entropy(x, weight, labels, chunk_size=4)
    for some in gradients(losses, [x, weight], torch.zeros_like(grad)):
        assert torch.equal(some, torch.zeros_like(some))
    grad[3:] = 0
    of_x, _ = gradients(linear_cross_entropy(x, weight, labels, chunk_size=4), [x, weight], grad)
    assert of_x[3:].abs().max() == 0 and of_x[:3].abs().min() > 0


def test_logits_far_from_zero():
    x = torch.tensor([[[300.0]]], requires_grad=True)
    weight = torch.tensor([[-10.0], [10.0]])
    for label, loss in ((0, 6000.0), (1, 0.0)):
        assert linear_cross_entropy(x, weight, torch.tensor([[label]]), chunk_size=1) == loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 0.5])
def test_in_16_bits_nothing_is_worse_than_with_whole_logits(dtype, scale):
    """Against float64. The losses are float32, and their error is that of float32."""
    torch.manual_seed(0)
    x, weight, labels, grad = made(200, 2, 64, 500, dtype)
    weight = (weight.detach() * scale).requires_grad_()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = plain(exact_x, exact_weight, labels)
    losses, whole = linear_cross_entropy(x, weight, labels, chunk_size=33), plain(x, weight, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
    truth = gradients(exact, [exact_x, exact_weight], grad)
    chunked, plainly = (gradients(some, [x, weight], grad) for some in (losses, whole))
    for exactly, one, other in zip(truth, chunked, plainly, strict=True):
        # Small logits lose nothing in 16 bits; what is left is the rounding of the result.
        assert (one - exactly).norm() <= 1.005 * (other - exactly).norm()


@pytest.mark.parametrize("seed", range(10))
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
    with pytest.raises(ValueError, match="side by side"):
        read_logits_(x, row.long())
    with pytest.raises(ValueError, match="side by side"):
        differentiate_logits_(x, row.long(), row, row, dtype=x.dtype)


def test_it_keeps_its_inputs_and_one_number_a_token():
    x, weight, labels, _ = made(40, 2, 8, 30, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x, weight, labels, chunk_size=4)
    assert sorted(t.numel() for t in kept) == [80, 80, 8 * 30, 80 * 8]


def test_a_chunk_of_nothing_is_refused():
    x, weight, labels, _ = made(2, 1, 3, 4)
    for chunk_size in (0, -1):
        with pytest.raises(ValueError, match="at least one row"):
            linear_cross_entropy(x, weight, labels, chunk_size=chunk_size)


def test_a_vocabulary_cut_over_ranks():
    """2 and 4 tensor-parallel ranks against one, that divide the rows or do not."""
    run_ranks(4, WORKER)
