"""Random cases of the kinds of attention on a sharded sequence, on however many ranks this was
started with: numbers against the definition in float64, and what goes over the network in bfloat16.

Arguments: number of cases, first seed, backend. Prints the cases that fail and exits 1.
"""

import sys

import torch
import torch.distributed as dist
from kind_cases import KindCase, random_case
from torch.utils.flop_counter import FlopCounterMode

from megalong.attention.dense import DensePasses
from megalong.attention.exchange import AllToAll, SequenceGroup
from megalong.attention.local import LocalPasses
from megalong.attention.passes import attend
from megalong.attention.sequence_plan import Shards, gathered_rows, make_plan
from megalong.parallel.traffic import CountTraffic

NARROW, WIDE = 2, 4  # bytes of bfloat16 and float32


def check(seed: int, group, backend: str) -> float:
    """The largest error of outputs, log-sum-exps and gradients. AssertionError where anything else
    is not as it should be."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    case = random_case(seed, ranks, longest=24 * ranks)
    sizes = case.passes.subgroup_sizes(case.pattern, case.length // ranks, ranks)
    sequence = SequenceGroup.create(group, sizes)
    here = slice(rank * case.length // ranks, (rank + 1) * case.length // ranks)
    documents = case.documents(here)
    options = {"causal": case.causal, "documents": documents, "backend": backend}
    passes = case.passes(case.pattern, sequence, **options)
    *qkv, grad = (x[:, here] for x in case.inputs())
    out, lse, kept = passes.forward(*qkv)
    found = out, lse, *passes.backward(grad, *qkv, out, lse, kept)
    again, lse_again, _ = passes.forward(*qkv, kept)
    assert torch.equal(out, again) and torch.equal(lse, lse_again), case
    leaves = [x.clone().requires_grad_() for x in qkv]
    by_autograd = attend(*leaves, passes)
    gradients = torch.autograd.grad(by_autograd, leaves, grad)
    assert all(map(torch.equal, (by_autograd, *gradients), (out, *found[2:]))), case
    if case.apart:
        check_isolation(case, passes, here, found)
    if backend != "triton":  # its interpreter multiplies bfloat16 wrongly
        check_traffic(case, passes, [x[:, here] for x in case.inputs(torch.bfloat16)])
    expected = [
        x[:, :, here] if number == 1 else x[:, here] for number, x in enumerate(case.reference())
    ]
    return max(
        (mine - theirs).nan_to_num(0, 0, 0).abs().max().item()
        for mine, theirs in zip(found, expected, strict=True)
    )


def check_isolation(case: KindCase, passes, here: slice, found: tuple) -> None:
    """A document with other numbers changes no bit of another; or without, where no tile holds
    both."""
    lost = case.ids == case.seed % (case.ids.max() + 1)
    number = 9.0 if passes.backend == "triton" else torch.nan
    *qkv, grad = (x.masked_fill(lost[..., None, None], number)[:, here] for x in case.inputs())
    out, lse, kept = passes.forward(*qkv)
    changed = out, lse, *passes.backward(grad, *qkv, out, lse, kept)
    others = ~lost[:, here]
    for number, (before, after) in enumerate(zip(found, changed, strict=True)):
        before, after = (x.mT if number == 1 else x for x in (before, after))
        assert torch.equal(before[others], after[others]), (number, case)


def check_traffic(case: KindCase, passes, inputs) -> None:
    """Bytes are to the byte what `traffic_of` says; with `kept`, rows do not come again, but those
    of a ring; and FLOPs are those of the pairs, over all ranks. All that whether documents are kept
    apart or not: where they begin has been swapped before."""
    *qkv, grad = inputs
    with CountTraffic({}) as forward, FlopCounterMode(display=False) as flops:
        out, lse, kept = passes.forward(*qkv)
    with CountTraffic({}) as backward:
        gradients = passes.backward(grad, *qkv, out, lse, kept)
    assert {x.dtype for x in (out, *gradients)} == {torch.bfloat16}, case
    with CountTraffic({}) as again:
        passes.forward(*qkv, kept)
    assert again.counts == (forward.counts if case.passes is DensePasses else {}), case

    expected = traffic_of(case, passes.sequence.rank, passes.sequence.size)
    names = ("all_gather", "all_to_all"), ("reduce_scatter", "all_to_all")
    for counter, wanted, collectives in zip((forward, backward), expected, names, strict=True):
        counts = counter.counts.get("other", {})
        found = [counts.get(name, {"bytes": 0})["bytes"] for name in collectives]
        assert found == wanted, (found, wanted, case)

    done = torch.tensor(flops.get_total_flops())
    dist.all_reduce(done)
    pairs = case.pattern.attention_pairs(case.length, case.heads, case.kv_heads, case.causal)
    assert done == 4 * case.head_dim * case.batch * pairs, case


def traffic_of(case: KindCase, rank: int, ranks: int) -> tuple[list[int], list[int]]:
    """Bytes of a forward and of a backward pass in bfloat16: of gathers, and of all-to-alls, where
    the larger of what is sent and what comes counts (`CountTraffic`)."""
    shard = case.length // ranks
    if case.passes is DensePasses:
        return dense_traffic(case, rank, ranks, shard)
    numbers = 2 * case.batch * case.head_dim  # of a row: keys and values
    if case.passes is LocalPasses:
        reach = case.pattern.window - 1
        before, behind = min(reach, rank * shard), min(reach, (ranks - 1 - rank) * shard)
        positions = max(before, behind) if case.causal else before + behind
        gathered, sent = 0, case.kv_heads * positions
    else:
        columns = max(
            sum(columns_seen(case, by, rank, shard) for by in range(ranks)),
            sum(columns_seen(case, rank, of, shard) for of in range(ranks)),
        )
        shards, block = Shards(rank, ranks, shard), case.pattern.own_block
        plan = make_plan(block, shards, case.heads, case.kv_heads, case.causal)
        gathered = gathered_rows(block, shards, case.heads, case.kv_heads)
        sent = columns + sum(
            max(sum(exchange.collective.sent), sum(exchange.collective.received))
            for exchange in plan.exchanges
            if isinstance(exchange.collective, AllToAll)
        )
    return tuple([x * numbers * width for x in (gathered, sent)] for width in (NARROW, WIDE))


def dense_traffic(case: KindCase, rank: int, ranks: int, shard: int):
    """As megalong/attention/dense.py says."""
    row, heads, kv_heads = case.batch * case.head_dim, case.heads, case.kv_heads
    half = -(-shard // 2)
    if not case.causal or 2 * rank == ranks - 1:  # its own mirror
        half = 0
    lse = case.batch * heads * half * WIDE
    around = (ranks - 1) * 2 * kv_heads * shard * row * NARROW
    forward = (heads + 2 * kv_heads) * half * row * NARROW + heads * half * row * NARROW + lse
    backward = (3 * heads + 2 * kv_heads) * half * row * NARROW + lse
    backward += (heads + 2 * kv_heads) * half * row * WIDE
    of_gradients = ranks * 2 * kv_heads * shard * row * WIDE
    return [0, forward + around], [0, backward + around + of_gradients]


def columns_seen(case: KindCase, by: int, of: int, shard: int) -> int:
    """Columns of a rank, over kv heads, that another one gets: those of all blocks before that of
    its last query, or of all blocks."""
    if by == of:
        return 0
    block, whole = case.pattern.block, case.length // case.pattern.block
    blocks = min(((by + 1) * shard - 1) // block, whole) if case.causal else whole
    return sum(
        (number * block + first + column) // shard == of
        for number in range(blocks)
        for first in case.pattern.first_columns(case.kv_heads)
        for column in range(case.pattern.columns)
    )


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases, first = map(int, sys.argv[1:3])
    [backend] = sys.argv[3:] or ["sdpa"]
    worst = {seed: check(seed, dist.group.WORLD, backend) for seed in range(first, first + cases)}
    bad = {seed: error for seed, error in worst.items() if not error < 1e-10}
    if bad:
        print(f"rank {dist.get_rank()}: {bad}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
