"""Each of 4 ranks has a slice of the vocabulary, of all 4 and of pairs, and compares its losses and
gradients with those of one process, in float64."""

import itertools

import torch
import torch.distributed as dist

from megalong.tiling.linear_cross_entropy import linear_cross_entropy
from megalong.tiling.tensor_ranks import TensorRanks


def check(ranks: TensorRanks, batch: int, chunk_size: int, with_logsumexp: bool) -> None:
    rows, hidden, vocabulary = 4 * 7, 6, 4 * 5
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


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for divides_rows, batch, chunk_size in itertools.product((False, True), (1, 2), (1, 5, 8, 99)):
        for size, group in ((4, dist.group.WORLD), (2, pairs[rank // 2])):
            ranks = TensorRanks(size, rank % size, group, divides_rows)
            check(ranks, batch, chunk_size, with_logsumexp=batch == 2)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
