"""Attention over a sharded sequence: against the definition on the whole sequence, the bytes that
go over the network, and the integers of the plan."""

import os

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalong.attention import DilatedPattern
from megalong.attention.dilated import sequence_parallel_attention
from megalong.attention.exchange import SequenceGroup
from megalong.attention.passes import merge
from megalong.attention.sequence_plan import (
    Shards,
    gathered_rows,
    pairs_of_rank,
    subgroup_sizes,
)
from tests.forked import run_ranks
from tests.launching import ranks_command, run

WORKER = __file__.replace("test_sequence_parallel", "sharded_worker")


FIRST_SEEDS = {2: 0, 3: 1000, 4: 2000, 8: 3000}


@pytest.mark.parametrize("ranks, cases", [(2, 40), (3, 30), (4, 24), (8, 16)])
def test_random_cases_equal_the_definition(ranks, cases):
    """Any width and rate, GQA, causal and not; float64, 1e-10, outputs, log-sum-exps and
    gradients."""
    run_ranks(ranks, WORKER, cases, FIRST_SEEDS[ranks], "sdpa")


@pytest.mark.long
@pytest.mark.parametrize("ranks", FIRST_SEEDS)
def test_many_random_cases_equal_the_definition(ranks):
    run_ranks(ranks, WORKER, 100, FIRST_SEEDS[ranks], "sdpa")


def test_the_reference_backend_is_sharded_as_well():
    run_ranks(3, WORKER, 20, 4000, "reference")


def test_bfloat16_follows():
    run_ranks(3, WORKER, 20, 6000, "sdpa", "bfloat16")


def test_the_triton_backend_is_sharded_as_well(monkeypatch):
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    run(ranks_command(2, WORKER, 6, 5000, "triton"))


def test_subgroups_are_consecutive_ranks_of_a_sequence():
    run_ranks(6, WORKER.replace("sharded", "subgroup"))


def test_a_dry_run_of_one_rank_needs_no_other_and_no_numbers():
    """Fake tensors in a fake process group: nothing on the way asks for a tensor's content."""
    pattern = DilatedPattern((24, 32, 64), (1, 2, 20))  # one is gathered, two are sent
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        sequence = SequenceGroup.create(dist.group.WORLD, subgroup_sizes(pattern, 16, 4))
        with FakeTensorMode():
            q, k, v = (torch.randn(2, 16, h, 8, requires_grad=True) for h in (4, 2, 2))
            out = sequence_parallel_attention(q, k, v, pattern, sequence, backend="sdpa")
            out.sum().backward()
    finally:
        dist.destroy_process_group()
    assert out.shape == q.grad.shape == (2, 16, 4, 8)
    assert k.grad.shape == v.grad.shape == (2, 16, 2, 8)


def test_a_merge_has_the_same_bits_whatever_the_order_of_axes_in_memory():
    out, new_out = torch.randn(2, 2, 17, 3, 8).unbind()
    lse, new_lse = torch.randn(2, 2, 17, 3).unbind()
    transposed = new_lse.mT.contiguous().mT
    merged = merge(out, lse, new_out, new_lse)
    assert all(map(torch.equal, merge(out, lse, new_out, transposed), merged))


# Four ranks of 16 positions.
LADDER = DilatedPattern((8, 16, 32, 64), (1, 2, 4, 8))


@pytest.mark.parametrize(
    "widths, rates", [((8, 16, 32, 64), (1, 2, 4, 8)), ((5, 24, 61), (2, 3, 7))]
)
def test_the_ranks_share_all_the_pairs(widths, rates):
    pattern = DilatedPattern(widths, rates)
    shares = [pairs_of_rank(pattern, Shards(rank, 4, 16), 4, 2) for rank in range(4)]
    assert sum(shares) == pattern.attention_pairs(64, 4, 2, causal=True)


def test_traffic_does_not_grow_with_the_ranks():
    """Local length and w / r fixed: from 2 to 8192 ranks a rank gets the same number of rows."""
    shard, rows = 2048, 64

    def gathered(ranks):
        width = ranks * shard
        pattern = DilatedPattern((rows, shard, width), (1, shard // rows, width // rows))
        return gathered_rows(pattern, Shards(0, ranks, shard), 4, 2)

    assert {gathered(2**k) for k in range(1, 6)} == {2 * rows}
