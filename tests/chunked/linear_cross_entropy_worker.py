"""Each of 4 ranks has a slice of the vocabulary, of all 4 and of pairs, and compares its losses and
gradients with those of one process, in float64; and which labels are the likeliest tokens, of
logits with many ties, with torch.argmax."""

import itertools

import torch
import torch.distributed as dist

from megalong.model.chunked.cross_entropy import (
    is_likeliest,
    linear_cross_entropy,
    linear_is_likeliest,
)
from megalong.model.chunked.rows import TensorRanks

ROWS, HIDDEN, VOCABULARY = 4 * 7, 6, 4 * 5


def check(ranks: TensorRanks, batch: int, chunk_size: int, with_logsumexp: bool) -> None:
    rows, hidden, vocabulary = ROWS, HIDDEN, VOCABULARY
    torch.manual_seed(chunk_size)
    x, grad = torch.randn(rows, batch, hidden).double(), torch.randn(rows, batch).double()
    weight = torch.randn(vocabulary, hidden).double() * 3
    labels = torch.randint(vocabulary, (batch, rows)).T
    if with_logsumexp:
        grad = torch.stack((grad, torch.randn(rows, batch).double()))

    def run(x, weight, **how):
        inputs = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        how |= {"chunk_size": chunk_size, "with_logsumexp": with_logsumexp}
        losses = linear_cross_entropy(*inputs, labels, **how)
        return losses, *torch.autograd.grad(losses, inputs, grad)

    losses, of_x, of_weight = run(x, weight)
    own_rows = x.chunk(ranks.shares)[ranks.rank % ranks.shares]
    mine = run(own_rows, weight.chunk(ranks.size)[ranks.rank], ranks=ranks)
    expected = (
        losses,
        of_x.chunk(ranks.shares)[ranks.rank % ranks.shares],
        of_weight.chunk(ranks.size)[ranks.rank],
    )
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def check_likeliest(ranks: TensorRanks, batch: int, chunk_size: int, used_rows: int | None) -> None:
    """used_rows: the others, which only fill up the vocabulary, would be likelier."""
    torch.manual_seed(chunk_size)
    x = torch.randint(-1, 2, (ROWS, batch, HIDDEN)).float()
    weight = torch.randint(-1, 2, (VOCABULARY, HIDDEN)).float()
    weight[used_rows or VOCABULARY :] *= 9
    logits = x @ weight.T  # small integers: exact, whatever the order of their sums
    slices = logits[..., :used_rows].chunk(2, -1)
    across = slices[0].amax(-1) == slices[-1].amax(-1)
    likeliest = logits[..., :used_rows].argmax(-1)
    labels = torch.where(torch.rand(ROWS, batch) < 0.5, likeliest, torch.randint(20, (ROWS, batch)))
    expected = likeliest == labels
    assert across.any() and 0 < expected.sum() < expected.numel()

    own_rows = x.chunk(ranks.shares)[ranks.rank % ranks.shares]
    own_weight = weight.chunk(ranks.size)[ranks.rank]
    own_logits = logits.chunk(ranks.size, -1)[ranks.rank]
    how = {"ranks": ranks, "used_rows": used_rows}
    assert torch.equal(is_likeliest(own_logits, labels, **how), expected)
    found = linear_is_likeliest(own_rows, own_weight, labels, chunk_size=chunk_size, **how)
    assert torch.equal(found, expected)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for divides_rows, batch, chunk_size in itertools.product((False, True), (1, 2), (1, 5, 8, 99)):
        for size, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
            ranks = TensorRanks(size, rank % size, group, divides_rows)
            check(ranks, batch, chunk_size, with_logsumexp=batch == 2)
            for used_rows in (None, 13, 4):  # of 4 ranks one, or three, have no other
                check_likeliest(ranks, batch, chunk_size, used_rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
