"""Documents weighted by their length: exactly, in every epoch and over all of them."""

from fractions import Fraction

import numpy as np
import pytest

from megalong.data.document_order import DocumentOrder
from megalong.data.sources import LengthUpsampling
from megalong.data.stream import TokenStream
from megalong.utils.errors import UserError

LENGTHS = np.random.default_rng(1).integers(0, 200, 97)


class Lengths:
    """Documents whose tokens are their number."""

    prefix, max_token_id = "lengths", None

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, np.int64)

    def read(self, document, start, stop):
        return np.full(stop - start, document)


@pytest.mark.parametrize("words", [["0:1", "100:5"], ["0:0.1", "50:1", "150:2.5"], ["100:0"]])
def test_weights_are_exact_over_epochs(words):
    upsampling = LengthUpsampling.parse(words)
    weights = [float(upsampling.weights[b]) for b in upsampling.bucket(LENGTHS)]
    order = DocumentOrder(LENGTHS, 5, upsampling=upsampling)
    times = np.zeros(len(LENGTHS))
    for epoch in range(23):
        assert order.total_before(epoch, LENGTHS) == times @ LENGTHS
        here = np.bincount(order.epoch(epoch), minlength=len(LENGTHS))
        times += here
        assert (np.abs(times - (epoch + 1) * np.array(weights)) < 1).all()
        for b, weight in enumerate(upsampling.weights):  # an epoch has its share of each bucket
            members = upsampling.bucket(LENGTHS) == b
            assert abs(here[members].sum() - float(weight) * members.sum()) <= 1
    assert (DocumentOrder(LENGTHS, 5, upsampling=upsampling).epoch(9) == order.epoch(9)).all()
    assert float(order.mean_total(LENGTHS)) == pytest.approx(np.array(weights) @ LENGTHS)


def test_weights_of_one_change_nothing():
    ones = LengthUpsampling.parse(["0:1", "100:1"])
    for epoch in (0, 7):
        plain, weighted = (DocumentOrder(LENGTHS, 5, upsampling=u) for u in (None, ones))
        assert (plain.epoch(epoch) == weighted.epoch(epoch)).all()


def test_a_stream_serves_each_epoch_whole_from_anywhere():
    upsampling = LengthUpsampling.parse(["0:0.4", "120:2.5"])
    options = {"seed": 2, "upsampling": upsampling}
    stream = TokenStream(Lengths(LENGTHS), range(90), 50, **options)
    begin = 0
    for epoch in range(6):
        documents = stream.order.epoch(epoch)
        wanted = np.repeat(documents, LENGTHS[documents])
        assert stream.tokens(begin, begin + len(wanted)).tolist() == wanted.tolist()
        begin += len(wanted)
    fresh = TokenStream(Lengths(LENGTHS), range(90), 50, **options)
    for i in np.random.default_rng(0).integers(0, begin // 50, 30):
        assert fresh.sample(i).tolist() == stream.tokens(50 * i, 50 * i + 51).tolist()


def test_shares_before_and_after():
    upsampling = LengthUpsampling.parse(["32768:5", "100:0.5"])
    assert upsampling.weights == (1, Fraction(1, 2), 5)
    line = upsampling.describe(np.array([50, 50, 400, 500, 40_000]))
    assert "less than 100 x 1: 0.2% -> 0.0%" in line
    assert "100 to 32,767 x 0.5: 2.2% -> 0.2%" in line
    assert "32,768 tokens and more x 5: 97.6% -> 99.7%" in line


@pytest.mark.parametrize(
    "words, message",
    [
        (["5"], "5: TOKENS:WEIGHT is expected"),
        (["32K:5"], "32K:5: TOKENS:WEIGHT"),
        (["1:x"], "1:x: TOKENS:WEIGHT"),
        (["1:nan"], "1:nan: TOKENS:WEIGHT"),
        (["1:1/0"], "TOKENS:WEIGHT"),
        (["-1:2"], "negative"),
        (["1:-2"], "1:-2: a weight lies between 0 and 10,000"),
        (["1:1e9"], "1:1e9: a weight lies between"),
        (["1:0.12345678"], "six digits"),
        (["7:1", "7:2"], "7 is there twice"),
        (["0:0", "7:0"], "a weight has to be positive"),
    ],
)
def test_bad_words_name_the_flag(words, message):
    with pytest.raises(UserError, match=f"--length-upsampling .*{message}"):
        LengthUpsampling.parse(words)


def test_nothing_left():
    upsampling = LengthUpsampling.parse(["0:0", "1000:1"])
    with pytest.raises(UserError, match="--length-upsampling leaves out all documents 0 to 97"):
        TokenStream(Lengths(LENGTHS), range(97), 8, upsampling=upsampling)
