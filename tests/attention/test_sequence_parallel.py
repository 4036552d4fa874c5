"""Attention over a sharded sequence: against the definition on the whole sequence, the bytes that
go over the network, and the integers of the plan."""

import os

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalong.attention import DilatedPattern
from megalong.attention.exchange import AllGather, AllToAll, SequenceGroup
from megalong.attention.remote_rows import remote_rows
from megalong.attention.sequence_parallel import sequence_parallel_attention
from megalong.attention.sequence_plan import gathered_rows, make_plan, subgroup_sizes
from megalong.attention.shard_rows import merge
from megalong.attention.shards import (
    Segment,
    Shards,
    crossing_segments,
    local_attention,
    pairs_of_rank,
    segment_at,
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


def plan_of(rank, pattern=LADDER, causal=True, heads=4, kv_heads=2):
    return make_plan(pattern, Shards(rank, 4, 16), heads, kv_heads, causal)


def exchange_of(*args, **options):
    """The only one of a plan: its collective, and the attention to what arrives."""
    [exchange] = remote_rows(plan_of(*args, **options), torch.device("cpu"))
    return exchange.collective, exchange.attention


def test_one_collective_for_each_size_of_subgroup():
    pattern = DilatedPattern((8, 32, 32, 64, 128), (1, 2, 4, 8, 16))
    for rank in range(4):
        sizes = [exchange.collective.ranks for exchange in plan_of(rank, pattern).exchanges]
        assert sizes == [2, 4]
    assert subgroup_sizes(pattern, 16, 4) == [2, 4]


def test_local_branches_exchange_nothing_and_stay_as_they_are():
    pattern = DilatedPattern((4, 16), (1, 3))
    for rank in range(4):
        plan = plan_of(rank, pattern)
        assert plan.exchanges == ()
        [local] = plan.local
        assert (local.start, local.stop) == (0, 16)
        assert local.pattern.offsets(4, 2) == pattern.offsets(4, 2)


def test_rows_that_are_rarer_than_shards_go_where_they_are_needed():
    """r > l: most ranks have no row, and nobody is sent what none of its queries sees."""
    pattern = DilatedPattern((64,), (32,), ((0, 1, 2, 3),))
    for rank in range(4):
        collective, attention = exchange_of(rank, pattern)
        assert isinstance(collective, AllToAll)
        # rows 0..3 and 32..35: the third rank's queries see the first rank's rows
        assert sum(collective.received) == (4 if rank == 2 else 0)
        assert sum(collective.sent) == (4 if rank == 0 else 0)
        assert len(attention) == (1 if rank == 2 else 0)


def test_earlier_ranks_are_attended_to_in_full_and_later_ones_not_at_all():
    pattern = DilatedPattern((64,), (2,))
    for rank in range(4):
        collective, attention = exchange_of(rank, pattern)
        assert isinstance(collective, AllGather)
        assert {len(a.key_rows) for a in attention} == ({8 * rank} if rank else set())
        _, attention = exchange_of(rank, pattern, causal=False)
        assert {len(a.key_rows) for a in attention} == {24}


@pytest.mark.parametrize(
    "position, length, expected",
    [(0, 8, (0, 8)), (17, 8, (16, 24)), (63, 8, (56, 64)), (62, 10, (60, 64)), (9, 99, (0, 64))],
)
def test_segment_at(position, length, expected):
    assert segment_at(position, length, 64) == expected


def test_crossing_segments_are_those_of_the_borders():
    found = crossing_segments(LADDER, Shards(1, 4, 16))
    assert found == [Segment(2, 0, 32), Segment(3, 0, 64)]
    found = crossing_segments(DilatedPattern((13,), (1,)), Shards(1, 4, 16))
    assert found == [Segment(0, 13, 26), Segment(0, 26, 39)]


def test_a_shard_in_the_middle_of_a_segment_has_shifted_offsets():
    [local] = local_attention(DilatedPattern((48,), (5,)), Shards(1, 3, 16), heads=3, kv_heads=3)
    # 16 positions lie before the shard: those 16 + t with (16 + t) mod 5 = 0, 1, 2
    assert local.pattern.offsets(3, 3) == ((4, 0, 1),)


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
