"""DilatedPattern: offsets, rows, the count of pairs, the ladder, and what it refuses."""

import pytest
from attention_cases import corners, random_case

from megalong.attention import DilatedPattern
from megalong.attention.reference import offered_keys


def test_offset_rules():
    pattern = DilatedPattern((8, 16), (1, 4), "mod")
    assert pattern.offsets(6, 6) == ((0,) * 6, (0, 1, 2, 3, 0, 1))
    assert pattern.offsets(6, 3) == ((0,) * 6, (0, 0, 1, 1, 2, 2))
    assert DilatedPattern((8, 16), (1, 4), "block").offsets(6, 3)[1] == (0, 0, 1, 1, 2, 2)
    assert DilatedPattern((8,), (5,), "block").offsets(12, 12)[0][-1] == 3  # leaves 4 unused
    layered = DilatedPattern((8, 16), (1, 4), "layer")
    assert layered.at_layer(0).offsets(6, 3) == pattern.offsets(6, 3)
    assert layered.at_layer(1).offsets(6, 3)[1] == (3, 3, 0, 0, 1, 1)
    assert pattern.at_layer(7).offsets(6, 6) == pattern.offsets(6, 6)


def test_slice_of_heads_keeps_the_offsets_of_the_whole_model():
    pattern = DilatedPattern((8, 16), (2, 4), "layer", layer=5)
    whole = pattern.offsets(8, 4)
    assert pattern.for_heads(8, 4, 4, 8).offsets(4, 2) == tuple(row[4:] for row in whole)


@pytest.mark.parametrize("case", [*corners(), *map(random_case, range(40))], ids=lambda c: c.name)
def test_pairs_are_those_of_the_definition(case):
    shape = (case.length, case.heads, case.kv_heads, case.causal)
    assert case.pattern.attention_pairs(*shape) == int(offered_keys(case.pattern, *shape).sum())


def test_flops():
    dense = DilatedPattern((64,), (1,))
    assert dense.attention_flops(64, 2, 2, 16) == 4 * 16 * 2 * 64 * 65 // 2


def test_geometric_ladder():
    pattern = DilatedPattern.geometric(100_000)
    assert pattern.segment_lengths == (2048, 8192, 32768, 100_000)
    assert pattern.dilation_rates == (1, 4, 16, 64)
    assert DilatedPattern.geometric(32768).segment_lengths == (2048, 8192, 32768)
    assert DilatedPattern.geometric(100).branches == ((100, 1),)
    assert DilatedPattern.geometric(100, head_offsets="layer").head_offsets == "layer"


def test_geometric_ladder_is_linear():
    """Eq. 18: bidirectional pairs stay within a/(a-1) w0 per position and head."""
    for length in (2**15, 2**20, 2**30):
        pattern = DilatedPattern.geometric(length)
        pairs = pattern.attention_pairs(length, 1, 1, causal=False)
        assert pairs <= 4 / 3 * 2048 * length


@pytest.mark.parametrize("case", [*corners(), *map(random_case, range(8))], ids=lambda c: c.name)
def test_text_is_the_whole_pattern(case):
    found = DilatedPattern.from_text(case.pattern.text)
    assert found == case.pattern and found is DilatedPattern.from_text(case.pattern.text)
    assert case.pattern.at_layer(9) == DilatedPattern.from_text(case.pattern.at_layer(9).text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "segment_lengths is empty"),
        (((8, 16), (1,)), "one of each per branch"),
        (((8, 0), (1, 2)), "segment_lengths must all be at least 1"),
        (((8, 16), (1, 0)), "dilation_rates must all be at least 1"),
        (((8.5,), (1,)), "segment_lengths must hold integers"),
        ((8, 1), "segment_lengths must hold integers"),
        (((8,), (1,), "modulo"), "head_offsets must be one of mod, block, layer"),
        (((8,), (2,), ((0, 2),)), r"branch 0 must lie in \[0, 2\)"),
        (((8, 16), (1, 2), ((0, 0),)), "one row per branch"),
        (((8, 16), (1, 2), ((0, 0), (1,))), "one integer per head"),
        (((8,), (1,), "mod", -1), "layer must be at least 0"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        DilatedPattern(*arguments)


def test_refuses_what_does_not_fit():
    table = DilatedPattern((8,), (2,), ((0, 1),))
    with pytest.raises(ValueError, match="table for 2 heads, but the queries have 4"):
        table.offsets(4, 4)
    with pytest.raises(ValueError, match="multiple of kv_heads"):
        table.offsets(4, 3)
    with pytest.raises(ValueError, match="head slice"):
        table.for_heads(2, 2, 1, 3)
    with pytest.raises(ValueError, match="at least 1"):
        DilatedPattern.geometric(0)
    with pytest.raises(ValueError, match="ratio must be at least 2"):
        DilatedPattern.geometric(100, 10, ratio=1)
