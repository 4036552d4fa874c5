"""The plan of a sharded sequence against a brute-force one, which enumerates (branch, query head,
query position, key position) for every rank. The collectives are played on lists of Python."""

import random
from collections import Counter

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megalong.attention import DilatedPattern
from megalong.attention.exchange import AllGather
from megalong.attention.sequence_parallel import remote_rows, shard_rows
from megalong.attention.sequence_plan import Shards, between, gathered_rows, make_plan

CPU = torch.device("cpu")


class Case:
    """A random pattern on a few shards."""

    def __init__(self, seed: int):
        draw = random.Random(seed)
        self.ranks, self.length = draw.randint(1, 8), draw.randint(1, 12)
        total = self.ranks * self.length
        widths, rates = [], []
        for _ in range(draw.randint(1, 3)):
            spanned = self.length * draw.randint(1, self.ranks)
            widths.append(draw.choice((spanned, spanned, draw.randint(1, 2 * total))))
            rates.append(draw.choice((1, 2, 3, draw.randint(1, widths[-1]), self.length + 1)))
        self.kv_heads = draw.choice((1, 2, 3))
        self.group = draw.choice((1, 2, 3))
        self.heads = self.kv_heads * self.group
        rule = draw.choice(("mod", "block", "layer", "table"))
        if rule == "table":
            rule = [[draw.randrange(rate) for _ in range(self.heads)] for rate in rates]
        self.pattern = DilatedPattern(widths, rates, rule, layer=draw.randint(0, 3))
        self.causal = draw.random() < 0.6

    def shards(self, rank: int) -> Shards:
        return Shards(rank, self.ranks, self.length)

    def exchanges(self, rank: int) -> dict:
        """The number of ranks that gather, or 0 where rows are sent -> the exchange in integers
        and its index tensors."""
        plan = make_plan(self.pattern, self.shards(rank), self.heads, self.kv_heads, self.causal)
        pairs = zip(plan.exchanges, remote_rows(plan, CPU), strict=True)
        return {
            getattr(exchange.collective, "ranks", 0): (exchange, rows) for exchange, rows in pairs
        }

    def pairs(self, rank: int) -> tuple[Counter, Counter]:
        """(branch, head, query, key) of a rank's queries: with its own keys, and with others'."""
        own, others = Counter(), Counter()
        offsets = self.pattern.offsets(self.heads, self.kv_heads)
        for branch, (width, rate) in enumerate(self.pattern.branches):
            for head, offset in enumerate(offsets[branch]):
                for query in range(rank * self.length, (rank + 1) * self.length):
                    if query % width % rate != offset:
                        continue
                    for key in range(self.ranks * self.length):
                        together = query // width == key // width
                        kept = together and key % width % rate == offset
                        if kept and (key <= query or not self.causal):
                            mine = key // self.length == rank
                            (own if mine else others)[branch, head, query, key] += 1
        return own, others


def row_list(case: Case, rank: int, rows) -> list:
    """(position, kv head) of each row that a rank puts in; None is filler."""
    start, filled = rank * case.length, [False] * len(rows.positions)
    listed = list(zip((rows.positions + start).tolist(), rows.kv_heads.tolist(), strict=True))
    for places in rows.distinct:
        added_at_once = [listed[place] for place in places.tolist()]
        assert len(set(added_at_once)) == len(added_at_once)
        for place in places.tolist():
            assert not filled[place]
            filled[place] = True
    return [row if there else None for row, there in zip(listed, filled, strict=True)]


def arrived(case: Case, rank: int, size: int) -> list:
    """What the exchange of a rank brings, of what all its ranks put in."""
    _, mine = case.exchanges(rank)[size]
    first = rank // size * size if size else 0
    lists = []
    for other in range(first, min(first + size, case.ranks) if size else case.ranks):
        _, theirs = case.exchanges(other)[size]  # it takes part, or this one waits in vain
        rows = row_list(case, other, theirs.leaving)
        if not size:
            sent = theirs.collective.sent
            assert sum(sent) == len(rows) and sent[rank] == mine.collective.received[other]
            rows = rows[sum(sent[:rank]) : sum(sent[: rank + 1])]
        lists.append(rows)
    assert len({len(rows) for rows in lists}) == 1 or not size
    return [row for rows in lists for row in rows]


def gathers(case: Case, branch: int) -> bool:
    """Segments span several whole shards, each with rows."""
    width, rate = case.pattern.branches[branch]
    whole = width % case.length == 0 or width >= case.ranks * case.length
    return whole and width > case.length >= rate and case.ranks > 1


def planned_pairs(case: Case, rank: int, exchange, came: list) -> Counter:
    """(branch, head, query, key) that the integers say, of blocks that lie where they say."""
    shards, pairs = case.shards(rank), Counter()
    for block in exchange.arriving.blocks:
        listed = came[block.places.start : block.places.stop]
        assert listed == [(key, block.rows.kv_head) for key in block.positions]
        pairs.update(
            (block.rows.segment.branch, head, query, key)
            for head in block.rows.heads
            for query in between(block.rows.positions, shards.start, shards.stop)
            for key in block.positions
        )
    return pairs


def attended_pairs(case: Case, rank: int, rows, came: list) -> Counter:
    """(head, query, key) that the index tensors say."""
    pairs, key_rows = Counter(), []
    for attention in rows.attention:
        key_rows += attention.key_rows.flatten().tolist()
        sharing = len(attention.heads) // attention.key_rows.shape[1]
        merged = []
        for number, head in enumerate(attention.heads.tolist()):
            keys = [came[place] for place in attention.key_rows[:, number // sharing].tolist()]
            assert {kv_head for _, kv_head in keys} == {head // case.group}
            queries = (attention.query_rows[:, number] + rank * case.length).tolist()
            merged += [(head, query) for query in queries]
            pairs.update((head, query, key) for query in queries for key, _ in keys)
        assert len(set(merged)) == len(merged)  # so that they can be merged at once
    assert len(set(key_rows)) == len(key_rows)  # so that gradients can be written, not added
    return pairs


@pytest.mark.parametrize("seed", range(120))
def test_every_pair_that_crosses_shards_is_attended_to_once_per_branch(seed):
    case = Case(seed)
    for rank in range(case.ranks):
        planned, attended = Counter(), Counter()
        for size, (exchange, rows) in case.exchanges(rank).items():
            came = arrived(case, rank, size)
            planned += planned_pairs(case, rank, exchange, came)
            attended += attended_pairs(case, rank, rows, came)
        _, others = case.pairs(rank)
        assert planned == others
        assert attended == without_branch(others)


@pytest.mark.parametrize("seed", range(120))
def test_a_rank_is_sent_each_row_that_it_sees_once_per_branch_and_no_other(seed):
    case = Case(seed)
    for rank in range(case.ranks):
        exchange, _ = case.exchanges(rank).get(0, (None, None))
        sent = Counter(
            (block.rows.segment.branch, key, block.rows.kv_head)
            for block in (exchange.arriving.blocks if exchange else ())
            for key in block.positions
        )
        assert sent.total() == (len(arrived(case, rank, 0)) if exchange else 0)
        _, others = case.pairs(rank)
        seen = {(branch, key, head // case.group) for branch, head, _, key in others}
        assert sent == Counter(row for row in seen if not gathers(case, row[0]))
        assert case.ranks > 1 or not case.exchanges(rank)


@pytest.mark.parametrize("seed", range(120))
def test_the_local_attention_has_the_pairs_inside_the_shard(seed):
    case = Case(seed)
    for rank in range(case.ranks):
        plan = make_plan(case.pattern, case.shards(rank), case.heads, case.kv_heads, case.causal)
        local = Counter()
        for piece in plan.local:
            inside = Case(seed)
            inside.ranks, inside.length, inside.pattern = 1, piece.stop - piece.start, piece.pattern
            first = rank * case.length + piece.start
            for (_, head, query, key), count in inside.pairs(0)[0].items():
                local[head, first + query, first + key] += count
        assert local == without_branch(case.pairs(rank)[0])


@pytest.mark.parametrize("seed", range(120))
def test_the_base_has_every_position_and_sums_have_the_rows_of_the_rest(seed):
    case = Case(seed)
    for rank in range(case.ranks):
        plan = make_plan(case.pattern, case.shards(rank), case.heads, case.kv_heads, case.causal)
        positions = [x for piece in plan.base for x in range(piece.start, piece.stop)]
        assert positions == list(range(case.length))
        rows = shard_rows(plan, case.heads, case.kv_heads, CPU)
        for shared, group in ((rows.queries, 1), (rows.keys, case.group)):
            assert_rows_share_places(shared)
            for piece, part in zip(plan.further, shared.parts, strict=False):
                [(width, rate)] = piece.pattern.branches
                kept = {
                    (position, head // group)
                    for head, offset in enumerate(
                        piece.pattern.offsets(case.heads, case.kv_heads)[0]
                    )
                    for position in range(piece.start, piece.stop)
                    if (position - piece.start) % width % rate == offset
                }
                assert set(listed(part.positions, part.heads)) == kept


def assert_rows_share_places(shared) -> None:
    place_of: dict[tuple, int] = {}
    for part in shared.parts:
        rows = listed(part.positions, part.heads)
        assert len(set(rows)) == len(rows)  # so that they can be added to at once
        for row, place in zip(rows, part.places.flatten().tolist(), strict=True):
            assert place_of.setdefault(row, place) == place
    assert len(set(place_of.values())) == len(place_of)
    taken = listed(shared.positions, shared.heads)
    assert all(taken[place] == row for row, place in place_of.items())


def listed(positions, heads) -> list[tuple[int, int]]:
    return list(zip(positions.flatten().tolist(), heads.flatten().tolist(), strict=True))


@pytest.mark.parametrize("seed", range(120))
def test_what_is_gathered_has_one_place_for_each_row_of_the_fullest_rank(seed):
    case = Case(seed)
    offsets = case.pattern.offsets(case.heads, case.kv_heads)
    for rank in range(case.ranks):
        expected = Counter()
        for branch, (width, rate) in enumerate(case.pattern.branches):
            size = min(width // case.length, case.ranks)
            members = range(case.ranks)[rank // max(size, 1) * size :][:size]
            if gathers(case, branch) and len(members) > 1:
                kept = {(head // case.group, o) for head, o in enumerate(offsets[branch])}
                expected[size] += len(members) * len(kept) * -(-case.length // rate)
        lists = {
            size: exchange.arriving.length
            for size, (exchange, _) in case.exchanges(rank).items()
            if isinstance(exchange.collective, AllGather)
        }
        assert lists == expected
        rows = gathered_rows(case.pattern, case.shards(rank), case.heads, case.kv_heads)
        assert rows == expected.total()


def without_branch(pairs: Counter) -> Counter:
    counts = Counter()
    for (_, *pair), count in pairs.items():
        counts[tuple(pair)] += count
    return counts


def test_index_tensors_of_a_dry_run_stay_in_it():
    """Fake tensors made under a mode, real ones outside of it, whichever came first."""
    for seed, fake_first in ((3, False), (4, True)):
        plan = make_plan(DilatedPattern((32,), (2,), layer=seed), Shards(1, 4, 16), 4, 2, True)
        if not fake_first:
            real = remote_rows(plan, CPU)
        for _ in range(2):
            with FakeTensorMode() as mode:
                [fake] = remote_rows(plan, CPU)
                assert remote_rows(plan, CPU)[0] is fake
                assert fake.leaving.positions.fake_mode is mode
        if fake_first:
            real = remote_rows(plan, CPU)
        assert remote_rows(plan, CPU) is real
        assert type(real[0].leaving.positions) is torch.Tensor
        assert real[0].leaving.positions.tolist() == list(range(0, 16, 2)) + list(range(1, 16, 2))
