"""The tile tables: every (branch, row, head) exactly once, and compact rows that do not collide."""

import pytest
import torch
from attention_cases import corners, random_case

from megalong.attention import DilatedPattern
from megalong.attention.triton.tables import Tables, pattern_tables, tile_table

CASES = [*corners(), *(random_case(seed, 300) for seed in range(60))]


def tables_of(case) -> Tables:
    return pattern_tables(case.pattern, case.length, case.heads, case.kv_heads, torch.device("cpu"))


def tile_rows(tables: Tables, line, head: int, block: int):
    """(position, compact row) of the rows of a tile, by the kernels' arithmetic."""
    branch, segment, tile = line
    width, rate, segment_rows, compact = tables.branches[branch].tolist()
    start = segment * width
    length = min(width, tables.length - start)
    offset = int(tables.offsets[branch, head])
    rows = (length - offset + rate - 1) // rate
    for t in range(tile * block, min((tile + 1) * block, rows)):
        yield start + offset + t * rate, compact + segment * segment_rows + t


def original_branches(case, tables):
    """The branches of the pattern in the order of the tables, each as {head: positions}."""
    offsets = case.pattern.offsets(case.heads, case.kv_heads)
    found = []
    for branch in range(len(case.pattern.branches)):
        segments = list(case.pattern.segments(branch, case.length))
        found.append(
            [
                sorted(
                    position
                    for segment in segments
                    for position in case.pattern.sparse_rows(branch, segment, offset)
                )
                for offset in offsets[branch]
            ]
        )
    return found


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_of_every_head_exactly_once(case, block):
    tables = tables_of(case)
    rows = [[[] for _ in range(case.heads)] for _ in tables.shapes]
    used = [set() for _ in range(case.heads)]
    for base in (False, True):
        lines = tile_table(tables, base, block, last_first=base).tolist()
        assert len(lines) == len({tuple(line) for line in lines})
        for line in lines:
            assert (line[0] == tables.sparse) == base
            for head in range(case.heads):
                for position, compact in tile_rows(tables, line, head, block):
                    rows[line[0]][head].append(position)
                    assert compact not in used[head]
                    used[head].add(compact)
                    assert (compact >= tables.sparse_rows) == base
    rows = [[sorted(head) for head in branch] for branch in rows]
    assert rows[-1] == [list(range(case.length))] * case.heads  # the base owns every row
    expected = original_branches(case, tables)
    if not tables.attends:
        rows.pop()
    assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_classes_are_the_offsets_of_a_group(case):
    tables = tables_of(case)
    group = case.heads // case.kv_heads
    for row, classes in zip(tables.offsets.tolist(), tables.classes.tolist(), strict=True):
        for kv_head, slots in enumerate(classes):
            used = [offset for offset in slots if offset >= 0]
            assert len(used) == len(set(used))
            assert set(used) == set(row[kv_head * group : (kv_head + 1) * group])
    if case.pattern.head_offsets in ("mod", "layer"):
        assert tables.slots == 1


def test_compact_rows_are_a_fraction():
    """A ladder of ratio 4 keeps 1/4 + 1/16 + ... < 1/3 of the rows between its two launches."""
    pattern = DilatedPattern.geometric(2**20)
    tables = pattern_tables(pattern, 2**20, 16, 16, torch.device("cpu"))
    assert tables.sparse_rows < 2**20 / 3
    assert len(tile_table(tables, True, 128, True)) == 2**20 // 128
