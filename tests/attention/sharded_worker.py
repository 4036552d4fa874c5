"""Random cases of sharded attention, on however many ranks this was started with.

Every rank holds the whole sequence too and compares its slice with the definition. Arguments:
number of cases, first seed, backend, dtype. Prints the cases that fail and exits 1.
"""

import contextlib
import random
import sys

import torch
import torch.distributed as dist
from document_cases import bounds, random_ids

from megalong.attention import DilatedPattern, dilated_attention_reference
from megalong.attention.dilated import DilatedPasses, sequence_parallel_attention
from megalong.attention.documents import documents_of
from megalong.attention.exchange import SequenceGroup
from megalong.attention.sequence_plan import Shards, gathered_rows, subgroup_sizes
from megalong.parallel.traffic import CountTraffic
from tests.quick_interpreter import quick_interpreter


def random_case(seed: int, ranks: int) -> dict:
    """Lengths of a shard from 1 to 24, up to four branches of every kind."""
    draw = random.Random(seed)
    shard = draw.randint(1, 24)
    total = shard * ranks
    widths, rates = [], []
    for _ in range(draw.randint(1, 4)):
        divisors = [d for d in range(1, shard + 1) if shard % d == 0]
        kind = draw.choice(("divides", "spans", "spans", "whole", "any"))
        width = {
            "divides": draw.choice(divisors),
            "spans": shard * draw.randint(2, ranks),
            "whole": draw.randint(total, 2 * total),
            "any": draw.randint(1, total),
        }[kind]
        widths.append(width)
        rates.append(draw.choice((1, 2, 3, draw.randint(1, max(width // 2, 1)), shard + 1)))
    kv_heads = draw.choice((1, 2, 3))
    heads = kv_heads * draw.choice((1, 2, 3))
    rule = draw.choice(("mod", "mod", "block", "layer", "table"))
    if rule == "table":
        rule = tuple(tuple(draw.randrange(rate) for _ in range(heads)) for rate in rates)
    return {
        "pattern": DilatedPattern(tuple(widths), tuple(rates), rule, layer=draw.randint(0, 3)),
        "shape": (draw.randint(1, 2), total, heads, kv_heads, draw.choice((1, 4, 8))),
        "causal": draw.random() < 0.6,
        "scale": draw.choice((None, 0.3)),
        "apart": seed % 2 == 1,
    }


def check(
    seed: int, group, backend: str, dtype: torch.dtype, by_groups: bool
) -> tuple[float, float, str]:
    """The largest errors, of output and log-sum-exp and of the gradients, and the case; in both,
    with by_groups those of heads in groups, of all that they find."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    case = random_case(seed, ranks)
    batch, total, heads, kv_heads, head_dim = case["shape"]
    pattern = case["pattern"]
    generator = torch.Generator().manual_seed(seed)
    whole = [
        torch.randn(batch, total, h, head_dim, dtype=torch.float64, generator=generator)
        for h in (heads, kv_heads, kv_heads, heads)
    ]
    *inputs, grad = (x.to(dtype).double() for x in whole)  # so that both get the same numbers
    options = {k: case[k] for k in ("causal", "scale")}
    names, documents = ("document_start", "document_stop"), (None, None)
    if case["apart"]:
        documents = bounds(random_ids(seed, batch, total))

    reference = [x.clone().requires_grad_() for x in inputs]
    of_all = dict(zip(names, documents, strict=True))
    out, lse = dilated_attention_reference(*reference, pattern, **options, **of_all)
    out.backward(grad)

    shard = total // ranks
    here = slice(rank * shard, (rank + 1) * shard)
    sequence = SequenceGroup.create(group, subgroup_sizes(pattern, shard, ranks))
    of_shard = {name: x if x is None else x[:, here] for name, x in of_all.items()}
    local = [x[:, here].to(dtype).requires_grad_() for x in inputs]
    with CountTraffic({}) as counter:
        my_out, my_lse = sequence_parallel_attention(
            *local, pattern, sequence, **options, **of_shard, return_lse=True, backend=backend
        )
        my_out.backward(grad[:, here].to(dtype))
    counts = counter.counts.get("other", {})
    if dtype == torch.float64:
        check_traffic(counts, case, Shards(rank, ranks, shard))
    qkv = [x.detach() for x in local]
    of_parts = 0.0
    if by_groups:
        found = (my_out.detach(), my_lse, *(x.grad for x in local))
        my_grad = grad[:, here].to(dtype)
        of_parts = check_passes(found, counts, qkv, my_grad, case, sequence, backend, of_shard)
    if seed % 4 == 1 and backend == "sdpa" and dtype == torch.float64:
        found = (my_out.detach(), my_lse.mT, *(x.grad for x in local))
        lost = documents[0] == documents[0][:, shard : shard + 1]
        check_isolation(found, whole, here, case, sequence, of_shard, lost)
    forward = max(difference(my_out, out[:, here]), difference(my_lse, lse[:, :, here]))
    backward = max(
        difference(mine.grad, theirs.grad[:, here])
        for mine, theirs in zip(local, reference, strict=True)
    )
    return max(forward, of_parts), max(backward, of_parts), str(case)


def check_traffic(counts: dict, case: dict, shards: Shards) -> None:
    """What is gathered is what `gathered_rows` says, forward and backward, to the byte."""
    batch, _, heads, kv_heads, head_dim = case["shape"]
    rows = gathered_rows(case["pattern"], shards, heads, kv_heads)
    for collective in ("all_gather", "reduce_scatter"):
        counted = counts.get(collective, {"bytes": 0})["bytes"]
        assert counted == rows * 2 * batch * head_dim * 8, (collective, case)


def check_isolation(found, whole, here: slice, case: dict, sequence, of_shard: dict, lost) -> None:
    """Documents lose their numbers, and no other changes a bit: in inputs laid out as they were."""
    for x in whole:
        x[lost] = torch.nan
    *leaves, grad = (x[:, here] for x in whole)
    leaves = [x.requires_grad_() for x in leaves]
    options = {name: case[name] for name in ("pattern", "causal", "scale")}
    out, lse = sequence_parallel_attention(
        *leaves, sequence=sequence, return_lse=True, backend="sdpa", **options, **of_shard
    )
    out.backward(grad)
    others = ~lost[:, here]
    for before, after in zip(found, (out, lse.mT, *(x.grad for x in leaves)), strict=True):
        assert torch.equal(before[others], after[others]), case


def check_passes(
    found, counts: dict, qkv, grad, case: dict, sequence, backend: str, of_shard: dict
) -> float:
    """Heads in groups, by the two functions of an attention: bit for bit what the public function
    finds for these heads, and as many bytes over the network as for all at once. Returns the
    largest difference from `found`, which the public function found for all."""
    _, _, heads, kv_heads, _ = case["shape"]
    groups = random.Random(str(case)).choice([n for n in (1, 2, 3) if kv_heads % n == 0])
    options = {name: case[name] for name in ("causal", "scale")}
    parts, traffic = [], CountTraffic({})
    for group in range(groups):
        own, kv_own = (
            slice(group * n // groups, (group + 1) * n // groups) for n in (heads, kv_heads)
        )
        pattern = case["pattern"].for_heads(heads, kv_heads, own.start, own.stop)
        documents = documents_of(*of_shard.values())
        passes = DilatedPasses(pattern, sequence, backend=backend, documents=documents, **options)
        inputs = [x[:, :, part] for x, part in zip(qkv, (own, kv_own, kv_own), strict=True)]
        with traffic:
            out, lse, kept = passes.forward(*inputs)
            gradients = passes.backward(grad[:, :, own], *inputs, out, lse, kept)
        parts.append((out, lse.mT, *gradients))

        if groups == 1:  # the public function has found that
            whole = (found[0], found[1].mT, *found[2:])
            assert all(map(torch.equal, parts[0], whole)), case
            continue
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = sequence_parallel_attention(
            *leaves, pattern, sequence, return_lse=True, backend=backend, **options, **of_shard
        )
        out.backward(grad[:, :, own])
        public = (out, lse.mT, *(x.grad for x in leaves))
        assert all(map(torch.equal, parts[-1], public)), (groups, case)
    assert gathered_bytes(traffic.counts.get("other", {})) == gathered_bytes(counts), case
    whole = [torch.cat(part, 2) for part in zip(*parts, strict=True)]
    whole[1] = whole[1].mT
    return max(map(difference, whole, found))


def gathered_bytes(counts: dict) -> list[int]:
    """Of the all-gathers and what undoes them. Of an all-to-all `CountTraffic` has the larger
    buffer, and larger ones of parts do not add up: that is for integers (`test_sequence_plan`)."""
    names = ("all_gather", "reduce_scatter")
    return [counts.get(name, {"bytes": 0})["bytes"] for name in names]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest value where that is above one."""
    same = one == other  # two infinities
    if not one.numel():
        return 0.0
    size = other.masked_fill(other.isinf(), 0.0).abs().max().clamp(min=1.0)
    return ((one - other).masked_fill(same, 0.0).abs().max() / size).item()


def main(count: str, first_seed: str, backend: str, dtype: str = "float64") -> None:
    tolerance = {"float64": 1e-10, "bfloat16": 0.05}[dtype]
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    failed = 0
    for seed in range(int(first_seed), int(first_seed) + int(count)):
        by_groups = backend != "triton" or seed % 6 == 0  # its interpreter is slow
        with quick_interpreter() if backend == "triton" else contextlib.nullcontext():
            forward, backward, case = check(
                seed, dist.group.WORLD, backend, getattr(torch, dtype), by_groups
            )
        if not (forward < tolerance and backward < tolerance):
            failed += 1
            print(f"rank {dist.get_rank()} seed {seed}: {forward:.1e} {backward:.1e} {case}")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
