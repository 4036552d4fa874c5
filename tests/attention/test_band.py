"""Bands: their numbers against a loop, the pieces they are cut into, and attention in them."""

import pytest
import torch
from band_cases import random_case, run_band, run_definition

from megalong.attention import reference, sdpa
from megalong.attention.patterns import Band
from megalong.attention.sdpa_bands import pieces

CASES = [random_case(seed) for seed in range(100)]


def test_ends_and_pairs_are_those_of_the_definition():
    for case in map(random_case, range(600)):
        seen = case.seen()
        for row in range(case.queries):
            there = range(case.band.start(row, case.keys), case.band.stop(row, case.keys))
            assert seen[row].nonzero().flatten().tolist() == [*there], case
        assert case.band.pairs(case.queries, case.keys) == seen.sum(), case
        assert Band.from_text(case.band.text) == case.band
        assert case.band.sees_all == (case.band.before is case.band.after is None)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"before": -2, "after": 2}, "before"),
        ({"first": -1}, "first"),
        ({"query_block": 0}, "query_block"),
        ({"key_block": 0}, "key_block"),
    ],
)
def test_what_is_no_band_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=name):
        Band(**fields)


def test_pieces_have_every_pair_once_and_write_first_where_they_say_so():
    for case in map(random_case, range(400)):
        counts = torch.zeros(case.queries, case.keys, dtype=torch.int32)
        for piece in pieces(case.band, range(case.queries), range(case.keys)):
            row, column = torch.arange(piece.rows)[:, None], torch.arange(piece.keys)
            mask = {
                "all": (row >= 0) & (column >= 0),
                "grows": column <= row,
                "shrinks": column >= row,
            }[piece.form]
            for tile in range(piece.tiles):
                first, key = piece.query + tile * piece.step, piece.key + tile * piece.step
                rows = counts[first : first + piece.rows]
                assert len(rows) == piece.rows and not (piece.first and rows.any()), case
                rows[:, key : key + piece.keys] += mask
        assert torch.equal(counts, case.seen().int()), case


def test_a_window_is_a_few_dense_attentions_however_long_the_sequence_is():
    numbers = {len(pieces(Band(1023, 1), range(2**k), range(2**k))) for k in range(14, 19)}
    assert len(numbers) == 1 and numbers.pop() <= 6


@pytest.mark.parametrize("backend", [sdpa, reference], ids=["sdpa", "reference"])
def test_rows_in_a_band_equal_the_definition(backend, poisoned):
    """With the gradients of a softmax over more keys than these."""
    for case in CASES:
        inputs = case.inputs()
        for found, expected in zip(
            run_band(case, backend, inputs), run_definition(case, inputs), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11, msg=str(case))


def test_rows_in_any_layout_and_few_bits():
    """What slices and transposes leave; bfloat16 is summed up in float32."""
    case = next(case for case in CASES if case.queries > 40 and case.keys > 40)
    expected = run_definition(case, case.inputs())
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in case.inputs()]
    gaps = [torch.cat((x, x), 1)[:, : x.shape[1]] for x in case.inputs()]
    for inputs in (turned, gaps):
        for found, wanted in zip(run_band(case, sdpa, inputs), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    out, lse, *shares = run_band(case, sdpa, case.inputs(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert {x.dtype for x in (lse, *shares)} == {torch.float32}
    for found, wanted in zip((out, lse, *shares), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05)
