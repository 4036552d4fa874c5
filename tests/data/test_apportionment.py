"""Whose turn it is: exact shares after any number of samples, whatever is asked for, and when."""

from fractions import Fraction

import numpy as np
import pytest

from megalong.data import blend
from megalong.data.blend import Apportionment


def random_shares(random: np.random.Generator) -> list[Fraction]:
    """Of 1 to 40 sources, alike or of very different sizes, some of them 0."""
    count = int(random.choice([1, 2, 2, 3, 4, 7, 40]))
    kinds = [
        lambda: int(random.integers(1, 4)),
        lambda: int(random.integers(1, 1000)),
        lambda: 10 ** int(random.integers(0, 13)),
        lambda: 0,
    ]
    weights = [kinds[random.integers(len(kinds))]() for _ in range(count)]
    weights[0] = weights[0] or 1
    return [Fraction(weight, sum(weights)) for weight in weights]


@pytest.mark.parametrize("seed", range(30))
def test_shares_are_exact_after_any_number_of_samples(seed):
    shares = random_shares(np.random.default_rng(seed))
    turns, counts = Apportionment(shares), [0] * len(shares)
    bound = 1 - Fraction(1, max(2 * sum(share > 0 for share in shares) - 2, 2))
    for i in range(500):
        assert turns.counts(i) == counts
        source, before = turns.turn(i)
        assert before == counts[source]
        counts[source] += 1
        off = [abs(count - share * (i + 1)) for count, share in zip(counts, shares, strict=True)]
        assert max(off) <= bound < 1


@pytest.mark.parametrize("seed", range(10))
def test_any_turn_may_be_asked_for_at_any_time(seed, monkeypatch):
    """With few states kept, and from a state that was kept elsewhere."""
    monkeypatch.setattr(blend, "BLOCK", 16)
    monkeypatch.setattr(blend, "_STATES", 4)
    random = np.random.default_rng(seed)
    shares = random_shares(random)
    whole = Apportionment(shares)
    expected = [whole.turn(i) for i in range(1500)]
    turns = Apportionment(shares)
    for i in random.permutation(1500)[:200].tolist():
        assert turns.turn(i) == expected[i]
        assert len(turns._states) <= 5 and len(turns._blocks) <= 2
    for cut in random.integers(0, 1500, 5).tolist():
        on = Apportionment(shares, whole.counts(cut))
        assert [on.turn(i) for i in range(cut, 1500)] == expected[cut:]
        if cut:
            with pytest.raises(IndexError):
                on.turn(cut - 1)


def test_a_trillion_samples_on():
    """What repeats is not computed again, and what does not goes on from its counts."""
    turns = Apportionment([Fraction(7, 10), Fraction(3, 10)])
    assert turns.counts(10**12) == [7 * 10**11, 3 * 10**11]
    assert turns.turn(10**12 + 1)[0] == turns.turn(1)[0]
    shares = [Fraction(1, 3), Fraction(10**15 + 37, 3 * 10**15), Fraction(10**15 - 37, 3 * 10**15)]
    counts = [round(share * 10**12) for share in shares]
    counts[0] -= sum(counts) - 10**12
    on = Apportionment(shares, counts)
    for i in (10**12 + 10, 10**12 + 5000):
        pairs = zip(on.counts(i), shares, strict=True)
        assert max(abs(count - share * i) for count, share in pairs) < 1


def test_shares_have_to_sum_to_one():
    for shares in ([Fraction(1, 2)], [Fraction(3, 2), Fraction(-1, 2)]):
        with pytest.raises(ValueError, match="their sum has to be 1"):
            Apportionment(shares)
