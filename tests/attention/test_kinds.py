"""Local, sparse and dense attention: against their definitions on whole and on sharded sequences,
what goes over the network, how the work is shared, and patterns that cost the same."""

import pytest
import torch
from kind_cases import random_case
from torch.utils.flop_counter import FlopCounterMode

from megalong.attention import DilatedPattern
from megalong.attention.dense import Ring
from megalong.attention.exchange import SequenceGroup
from megalong.attention.passes import attend
from megalong.attention.patterns import LocalPattern, matching_sparse, matching_window
from tests.forked import run_ranks

WORKER = __file__.replace("test_kinds", "kinds_worker")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_random_cases_equal_the_definition(backend, poisoned):
    """Outputs, log-sum-exps and gradients, of all heads and of the last group of heads."""
    for case in map(random_case, range(60)):
        *qkv, grad = case.inputs()
        options = {"backend": backend, "causal": case.causal, "documents": case.documents()}
        passes = case.passes(case.pattern, **options)
        out, lse, kept = passes.forward(*qkv)
        found = out, lse, *passes.backward(grad, *qkv, out, lse, kept)
        for mine, expected in zip(found, case.reference(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-11, msg=str(case))

        leaves = [x.clone().requires_grad_() for x in qkv]
        by_autograd = attend(*leaves, passes)
        gradients = torch.autograd.grad(by_autograd, leaves, grad)
        assert all(map(torch.equal, (by_autograd, *gradients), (out, *found[2:]))), case

        group = case.heads // case.kv_heads
        last = case.pattern.for_heads(case.heads, case.kv_heads, case.heads - group, case.heads)
        passes = case.passes(last, **options)
        inputs = (x[:, :, -n:] for x, n in zip(qkv, (group, 1, 1), strict=True))
        out_of_last, *_ = passes.forward(*inputs)
        torch.testing.assert_close(out_of_last, out[:, :, -group:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks, cases", [(2, 24), (3, 16), (4, 12), (8, 8)])
def test_random_cases_equal_the_definition_on_ranks(ranks, cases):
    """Numbers, bytes over the network, FLOPs: see the worker."""
    run_ranks(ranks, WORKER, cases, 1000 * ranks)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_many_random_cases_equal_the_definition_on_ranks(ranks):
    run_ranks(ranks, WORKER, 40, 1000 * ranks)


def test_pairs_and_flops_are_those_of_the_definition():
    for case in map(random_case, range(100, 124)):
        pairs = case.pattern.attention_pairs(case.length, case.heads, case.kv_heads, case.causal)
        assert pairs == case.seen().sum(), case
        passes = case.passes(case.pattern, causal=case.causal, documents=case.documents())
        with FlopCounterMode(display=False) as counter:
            passes.forward(*case.inputs()[:3])
        assert counter.get_total_flops() == 4 * case.head_dim * case.batch * pairs, case


def test_the_ranks_of_a_ring_share_the_work_of_causal_attention():
    """In each step of the ring, so that nobody waits; together it is all of it."""
    for ranks in (2, 3, 4, 5, 8, 17, 32, 64):
        for shard in (64, 101):
            work = [work_of_rank(rank, ranks, shard) for rank in range(ranks)]
            totals = [*map(sum, work)]
            length = ranks * shard
            assert sum(totals) == length * (length + 1) // 2
            assert max(totals) <= 1.05 * sum(totals) / ranks
            steps = [*zip(*work, strict=True)]
            assert sum(map(max, steps)) <= 1.05 * sum(totals) / ranks


def work_of_rank(rank: int, ranks: int, shard: int) -> list[int]:
    """Pairs in each step of the ring, of one head."""
    ring = Ring(SequenceGroup(rank, ranks, None, {}), shard, causal=True)
    parts = [ring.part((rank - step) % ranks) for step in range(ranks)]
    return [
        part.band.pairs(*(len(range(shard)[at]) for at in (part.queries, part.keys)))
        for part in parts
    ]


@pytest.mark.parametrize("length", [2048, 12000, 2**20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 12), (6, 2)])
def test_matched_patterns_cost_the_same(length, heads, kv_heads):
    """Within 2%, counted."""
    for dilated in (
        DilatedPattern.geometric(length),
        DilatedPattern((512, 2048, length), (1, 4, 12)),
    ):
        for causal in (True, False):
            pairs = dilated.attention_pairs(length, heads, kv_heads, causal)
            window = matching_window(pairs, length, heads, causal)
            sparse = matching_sparse(pairs, length, heads, kv_heads, 1024, causal)
            for pattern in (LocalPattern(window), sparse):
                found = pattern.attention_pairs(length, heads, kv_heads, causal)
                assert abs(found - pairs) <= 0.02 * pairs, pattern
