"""Sources as flags and files name them, and one line for what is wrong."""

from fractions import Fraction

import numpy as np
import pytest

from megalong.data.document_order import DocumentOrder
from megalong.data.sources import LengthUpsampling, shares_of, sources_of_file, sources_of_flag
from megalong.data.stream import TokenStream
from megalong.utils.errors import UserError


def test_paths_with_weights_and_names():
    code, books = sources_of_flag(["0.7", "code=a/b", "0.3", "c/d_text_document"], "--data-path")
    assert (code.name, code.path, code.named, code.amount) == ("code", "a/b", True, Fraction(7, 10))
    assert (books.name, books.named, books.place) == (
        "d_text_document",
        False,
        "--data-path c/d_text_document",
    )
    assert shares_of([code, books], [1, 10**9]) == [Fraction(7, 10), Fraction(3, 10)]
    [alone] = sources_of_flag(["0.5"], "--data-path")  # a file of that name
    assert alone.path == "0.5"
    pattern, folder = sources_of_flag(["x/part_*", "y/shards/"], "--data-path")
    assert (pattern.name, folder.name, folder.path) == ("part", "shards", "y/shards/")


def test_without_weights_sources_are_as_much_as_they_have_tokens():
    specs = sources_of_flag(["a", "b", "c"], "--data-path")
    assert shares_of(specs, [1, 2, 7]) == [Fraction(1, 10), Fraction(1, 5), Fraction(7, 10)]


@pytest.mark.parametrize(
    "words, message",
    [
        ("0.7 a 0.3", "no path behind the weight 0.3"),
        ("0.7 a b 0.3", "a weight is expected in the place of b"),
        ("a b 0.3", "a weight is expected in the place of a"),
        ("0.7 0.3 a b", "a path is expected in the place of 0.3"),
        ("-1 a 2 b", "-1: must be a number and not negative"),
        ("nan a 1 b", "nan: must be a number and not negative"),
        ("inf a 1 b", "inf: must be a number and not negative"),
        ("0 a 0.0 b", "all weights are 0"),
        ("x/a y/a", "both x/a and y/a have the name a: name them otherwise"),
        ("one=x one=y", "both x and y have the name one"),
        ("one=", "no path behind the name"),
    ],
)
def test_what_is_wrong_with_a_flag(words, message):
    with pytest.raises(UserError, match=r"^--data-path") as error:
        sources_of_flag(words.split(), "--data-path")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_validation_set_has_no_weight():
    with pytest.raises(UserError, match=r"--valid-data-path: 0.5 looks like a weight"):
        sources_of_flag(["0.5", "a"], "--valid-data-path", weighted=False)


def read(tmp_path, text: str):
    file = tmp_path / "blend.yaml"
    file.write_text(text)
    return sources_of_file(str(file))


def test_a_file(tmp_path):
    specs = read(
        tmp_path, "- {name: code, path: a, tokens: 3e9}\n- path: b\n  epochs: 2\n- path: c"
    )
    assert [spec.name for spec in specs] == ["code", "b", "c"]
    shares = shares_of(specs, [10, 10**9, 5 * 10**9])
    assert shares == [Fraction(3, 10), Fraction(2, 10), Fraction(5, 10)]
    specs = read(tmp_path, "- {path: a, weight: 0.1}\n- {path: b, weight: 0.2}\n")
    assert shares_of(specs, [1, 1]) == [Fraction(1, 3), Fraction(2, 3)]  # exactly


@pytest.mark.parametrize(
    "text, message",
    [
        ("- path: a\n  weigth: 3\n", "line 2: unknown key weigth; did you mean weight?"),
        ("- path: a\n- path: b\n  xyz: 3\n", "line 3: unknown key xyz; there are name, path"),
        ("- name: a\n", "line 1: no `path: ...`"),
        ("- path: a\n- b\n", "line 2: expected `path: ...` and the like, found 'b'"),
        ("path: a\n", "a list of sources is expected"),
        ("", "a list of sources is expected"),
        ("- path: [a\n", "line 2: not YAML"),
        ("- {path: a, weight: 1, tokens: 3}\n", "weight and tokens are two ways to say how much"),
        ("- {path: a, weight: 1}\n- {path: b, epochs: 1}\n", "weights for all sources, or tokens"),
        ("- {path: a, weight: .nan}\n", "line 1: weight nan: must be a number and not negative"),
        ("- {path: a, epochs: -2}\n", "line 1: epochs -2: must be a number and not negative"),
        ("- {path: a, tokens: many}\n", "line 1: tokens 'many': a number is expected"),
        ("- {path: a, tokens: true}\n", "line 1: tokens True: a number is expected"),
        ("- {path: a, weight: 0}\n", "all weights are 0"),
        ("- {path: a, name: b/c}\n", "line 1: name 'b/c' may have letters"),
        ("- {path: x/a}\n- {path: y/a}\n", "both x/a and y/a have the name a"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    with pytest.raises(UserError, match=r"^--data-blend .*blend\.yaml") as error:
        read(tmp_path, text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"--data-blend none\.yaml: No such file"):
        sources_of_file("none.yaml")


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
