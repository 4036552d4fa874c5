"""A blend: every source by its share, in its own order, and going on where it was."""

import json
import re
from fractions import Fraction
from functools import partial
from itertools import islice

import numpy as np
import pytest

from megalong.data import blend as blend_module
from megalong.data.batches import training_batches
from megalong.data.blend import Apportionment, Blend, History, Source
from megalong.data.stream import TokenStream

N = 16


class Numbered:
    """Documents of 0 to 8 tokens, each of which says whose it is, and where it stands."""

    max_token_id = vocab_size = prepend_bos = None
    masks_loss = False

    def __init__(self, number: int, documents: int):
        self.prefix, self.base = f"source{number}", number * 1_000_000
        self.lengths = np.random.default_rng(number).integers(0, 9, documents)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self.base + document * 10 + np.arange(start, stop)


DATA = {"code": Numbered(1, 60), "books": Numbered(2, 33), "wiki": Numbered(3, 47)}


def blend(length: int = N, **shares) -> Blend:
    def opened(name: str, salt: int) -> TokenStream:
        documents = DATA[name]
        part = range(len(documents.lengths))
        return TokenStream(documents, part, length, seed=7, name=name, salt=salt)

    total = sum(map(Fraction, shares.values()))
    return Blend(
        [Source(name, Fraction(s) / total, partial(opened, name)) for name, s in shares.items()]
    )


def read(samples, start: int, stop: int) -> list[list[int]]:
    return [samples.sample(i).tolist() for i in range(start, stop)]


def of(name: str, samples: list[list[int]]) -> list[list[int]]:
    """Those of one source, in order."""
    return [sample for sample in samples if sample[0] // 1_000_000 * 1_000_000 == DATA[name].base]


def resumed(new: Blend, old: Blend, at: int) -> tuple[Blend, list[str]]:
    """The blend that goes on at a sample, through what a checkpoint keeps."""
    kept = json.loads(json.dumps(old.history(at).values()))
    return new.continued(at, History.from_values(kept))


def test_every_source_gives_its_own_samples_in_their_order():
    mixed = blend(code="0.5", books="0.3", wiki="0.2")
    samples = read(mixed, 0, 200)
    assert [mixed.sources[mixed.source(i)] for i in range(200)] == [
        next(name for name in DATA if of(name, [sample])) for sample in samples
    ]
    for name, count in (("code", 100), ("books", 60), ("wiki", 40)):
        part = mixed.parts[mixed.sources.index(name)]
        assert of(name, samples) == read(part, 0, count)
        share, epochs = mixed.realised(200)[name]
        assert share == count / 200
        assert epochs == count * N / DATA[name].lengths.sum()
    # Sources that are alike have orders of their own.
    orders = [part.order.epoch(0)[:10].tolist() for part in mixed.parts]
    assert orders[0] != orders[1] != orders[2]


def test_one_source_is_its_stream():
    """As it was before there were blends."""
    stream = TokenStream(DATA["code"], range(60), N, seed=7)
    assert read(blend(code=1), 0, 80) == read(stream, 0, 80)


def test_nothing_hangs_on_the_order_in_which_sources_are_listed():
    samples = read(blend(code=1, books=1, wiki=1), 0, 60)
    assert samples == read(blend(wiki=1, code=1, books=1), 0, 60)


def test_the_same_blend_goes_on_as_if_nothing_had_been():
    shares = {"code": "0.55", "books": "0.35", "wiki": "0.1"}
    whole = blend(**shares)
    samples = read(whole, 0, 150)
    for at in (0, 1, 2, 3, 17, 40, 41, 149):
        again, news = resumed(blend(**shares), whole, at)
        assert not news and read(again, at, 150) == samples[at:]
        assert again.history(150) == whole.history(150)


def test_a_change_changes_what_follows_only():
    """Shares change, a source goes, one comes, and the first comes back: each goes on."""
    old = blend(code="0.7", books="0.3")
    samples = read(old, 0, 50)
    new, [line] = resumed(blend(code="0.4", books="0.6"), old, 50)
    assert line == (
        "from sample 50 on the training data is code 0.4, books 0.6; before it was code 0.7, books"
        " 0.3"
    )
    samples += read(new, 50, 100)
    assert [sum(map(bool, of(name, samples[50:]))) for name in ("code", "books")] == [20, 30]
    without, [line] = resumed(blend(books=1, wiki=1), new, 100)
    samples += read(without, 100, 140)
    back, _ = resumed(blend(code=1, books=1, wiki=2), without, 140)
    samples += read(back, 140, 200)
    for name in DATA:
        its = of(name, samples)
        part = back.parts[back.sources.index(name)]
        assert its == read(part, 0, len(its))
    history = back.history(200)
    assert [phase.first for phase in history.phases] == [0, 50, 100, 140]
    assert history.phases[1].began == {"code": 35, "books": 15}
    assert history.phases[3].began == {"code": 55, "books": 65, "wiki": 20}
    assert history.taken == {"code": 15, "books": 15, "wiki": 30}
    assert history.in_words()[2] == "training data from sample 100 on: books 0.5, wiki 0.5"
    assert history.in_words()[-1].startswith("epochs read: code ")


def test_other_sources_join_one_that_is_under_way():
    """It keeps the order that it has alone; also after a checkpoint that knows of no blends."""
    alone = blend(code=1)
    for history in (alone.history(30), History.of_one("code", 30 * N, N)):
        joined, news = blend(code="1/2", wiki="1/2").continued(30, history)
        assert "before it was code 1" in news[0]
        samples = read(alone, 0, 30) + read(joined, 30, 90)
        assert of("code", samples) == read(alone, 0, 60)


def test_longer_sequences_go_on_at_the_same_places():
    old = blend(code="0.7", books="0.3")
    longer = blend(length=2 * N, code="0.7", books="0.3")
    new, news = longer.continued(20, old.history(40))
    assert not news
    samples = read(new, 20, 60)
    assert of("code", samples)[0][:N] == old.parts[0].sample(28)[:N].tolist()
    assert of("books", samples)[0][:N] == old.parts[1].sample(12)[:N].tolist()
    assert new.history(60).phases[1].began == {"code": 14, "books": 6}


def test_data_that_has_grown_is_told():
    old = blend(code=1, books=1)
    history = old.history(10)
    history.epoch_tokens["books"] -= 5
    _, [line] = blend(code=1, books=1).continued(10, history)
    assert re.fullmatch(r"source books has \d+ tokens, and had \d+: it goes on at .* order", line)


@pytest.mark.parametrize("size, micro", [(1, 8), (2, 2), (4, 1), (8, 1)])
def test_a_global_batch_is_the_same_in_any_layout_and_says_its_sources(size, micro):
    mixed = blend(code="0.7", books="0.3")
    for consumed in (0, 5):
        rows = {}
        for rank in range(size):
            batches = training_batches(
                mixed,
                consumed_samples=consumed,
                global_batch_size=8,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=size,
            )
            for m, batch in enumerate(islice(batches, 3 * 8 // (size * micro))):
                for j in range(micro):
                    i = consumed + (m * size + rank) * micro + j
                    rows[i] = batch["tokens"][j].tolist(), int(batch["source"][j])
        assert rows == {
            i: (mixed.sample(i, 0, N).tolist(), mixed.source(i))
            for i in range(consumed, consumed + 24)
        }


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
    monkeypatch.setattr(blend_module, "BLOCK", 16)
    monkeypatch.setattr(blend_module, "_STATES", 4)
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
