"""The share of one rank, alone in its process: equal to its slice of the whole, where the others'
rows are true; right in number and place, where they are made up."""

import json

import pytest
import torch
import torch.distributed as dist

from megalong.attention import DilatedPattern, dilated_attention
from megalong.attention.dilated import sequence_parallel_attention
from megalong.attention.sequence_plan import Shards, gathered_rows, subgroup_sizes
from megalong.dry_run.share import SyntheticRows, answered, lone_rank, lone_sequence
from megalong.parallel.traffic import CountTraffic
from tests.dry_run.rehearsal import Rehearsal
from tests.dry_run.share_worker import CASES
from tests.forked import run_ranks
from tests.launching import made_once

WORKER = __file__.replace("test_share", "share_worker")
HEADS = 4, 2, 2, 4  # of q, k, v and the gradient
PATTERNS = {
    "gathered": (DilatedPattern.geometric(1024, 32), 16),
    "sent": (DilatedPattern((16, 100, 700), (1, 3, 150)), 8),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    path = made_once(tmp_path_factory, "shares.json", lambda path: run_ranks(1, WORKER, path))
    return json.loads(path.read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_shares_of_all_ranks_are_a_training_step_of_one_process(steps, case):
    first, *_, last = steps[case]
    assert last[0] < 1e-5 and last[1] < 1e-6 and last[2] < 2e-6, steps[case]
    assert min(first[0], first[2]) > 1e-4  # and not without what the others have


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_attention_share_is_its_slice_of_the_whole(name, causal):
    pattern, ranks = PATTERNS[name]
    length = 1024 // ranks
    generator = torch.Generator().manual_seed(0)
    *inputs, grad = (
        torch.randn(2, 1024, heads, 8, dtype=torch.float64, generator=generator) for heads in HEADS
    )
    whole = [x.clone().requires_grad_() for x in inputs]
    out = dilated_attention(*whole, pattern, causal=causal)
    out.backward(grad)
    rehearsal = Rehearsal()
    for _ in range(3):  # rows come, then gradients of them
        close = []
        for rank in range(ranks):
            here = slice(rank * length, (rank + 1) * length)
            local = [x[:, here].clone().requires_grad_() for x in inputs]
            with lone_rank(rank, ranks):
                sequence = lone_sequence(subgroup_sizes(pattern, length, ranks))
                with answered(sequence, rehearsal.of(rank)):
                    mine = sequence_parallel_attention(*local, pattern, sequence, causal=causal)
                    mine.backward(grad[:, here])
            close += [torch.allclose(mine, out[:, here], rtol=0, atol=1e-13)]
            close += [
                torch.allclose(x.grad, y.grad[:, here], rtol=0, atol=1e-13)
                for x, y in zip(local, whole, strict=True)
            ]
        rehearsal.next_round()
    assert len(close) == 4 * ranks and all(close), close  # of the last round


def synthetic_share(rank: int, ranks: int, length: int, pattern: DilatedPattern):
    """Output, gradients and traffic of a rank, all of whose numbers are 1 or drawn."""
    inputs = [torch.ones(1, length, heads, 8).requires_grad_() for heads in HEADS[:3]]
    with lone_rank(rank, ranks), CountTraffic({}) as traffic:
        sequence = lone_sequence(subgroup_sizes(pattern, length, ranks))
        with answered(sequence, SyntheticRows()):
            out = sequence_parallel_attention(*inputs, pattern, sequence)
            out.backward(torch.ones_like(out))
    return out, [x.grad for x in inputs], traffic.counts["other"]


def test_a_billion_tokens_over_many_ranks():
    """Of a pattern over all of 2^30 tokens, with synthetic rows: bytes to the number, results that
    hang on the others' rows and are finite and the same again."""
    length, ranks, rank = 2**16, 2**14, 2**14 - 1
    pattern = DilatedPattern((64, 2**18, 2**30), (1, 2**9, 2**16))
    out, gradients, counts = synthetic_share(rank, ranks, length, pattern)
    rows = gathered_rows(pattern, Shards(rank, ranks, length), *HEADS[:2])
    for collective in ("all_gather", "reduce_scatter"):
        assert counts[collective] == {"calls": 2, "bytes": rows * 2 * 8 * 4}
    assert out.isfinite().all() and (out != 1).any()
    again, same, _ = synthetic_share(rank, ranks, length, pattern)
    assert torch.equal(out, again)
    assert all(map(torch.equal, gradients, same))


def test_whoever_gets_a_row_gets_the_same_one():
    """Rank 0 and rank 3 of four, of the list of rank 2."""
    found = []
    for rank in (0, 3):
        with lone_rank(rank, 4):
            sequence = lone_sequence([4])
            with answered(sequence, SyntheticRows()):
                rows = torch.ones(5, 2, 1, 8)
                gathered = torch.empty(20, 2, 1, 8)
                dist.all_gather_into_tensor(gathered, rows, group=sequence.subgroups[4])
        assert torch.equal(gathered[5 * rank : 5 * rank + 5], rows)
        found.append(gathered[10:15])
    assert torch.equal(*found)
    assert len(found[0][:, 0, 0, 0].unique()) == 5


def test_there_is_no_such_rank():
    with pytest.raises(ValueError, match="rank 4 of 4: they count from 0"), lone_rank(4, 4):
        pass
