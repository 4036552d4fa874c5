"""Samples that begin where documents begin: what the rule says, with every token once."""

import numpy as np
import pytest

from megalong.data.document_samples import DocumentSamples
from megalong.data.indexed import IndexedDocuments
from megalong.data.sources import LengthUpsampling
from megalong.data.stream import TokenStream

BASE = 1000  # token = document * BASE + its place


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Prefixes of documents of these lengths, all tokens of which are different."""
    from megalong.data.preprocessing.writer import DocumentWriter

    folder = tmp_path_factory.mktemp("corpora")

    def write(lengths) -> IndexedDocuments:
        prefix = str(folder / "-".join(map(str, lengths))[:50])
        with DocumentWriter(prefix, np.int32, overwrite=True) as writer:
            tokens = [i * BASE + t for i, length in enumerate(lengths) for t in range(length)]
            writer.add(np.array(tokens, np.int32), lengths)
            writer.commit({})
        return IndexedDocuments(prefix)

    return write


LENGTHS = {
    "mixed": [0, 1, 5, 16, 17, 33, 100, 3, 0, 48, 250, 15, 2, 7],
    "long": [64, 17, 90, 333],
    "short": [1, 2, 3, 0, 5, 6],
    "multiples": [16, 32, 64],
    "one": [999],
    "tiny": [1],
}


def samples_of(documents, length=16, seed=3, weights=None) -> DocumentSamples:
    upsampling = None if weights is None else LengthUpsampling.parse(weights)
    count = documents.num_documents
    return DocumentSamples(
        TokenStream(documents, range(count), length, seed, upsampling=upsampling)
    )


def expected(documents, length, seed, epochs, upsampling=None) -> list[tuple[list[int], int]]:
    """The samples that are full after so many epochs, written down as the rule says."""
    stream = TokenStream(
        documents, range(documents.num_documents), length, seed, upsampling=upsampling
    )
    found, rests = [], []
    for epoch in range(epochs):
        for document in stream.order.epoch(epoch):
            tokens = documents.read(int(document)).tolist()
            whole = len(tokens) // length * length
            found += [tokens[k : k + length] for k in range(0, whole, length)]
            rests += tokens[whole:]
            if len(rests) >= length:
                found.append(rests[:length])
                rests = rests[length:]
    return found


@pytest.mark.parametrize("weights", [None, ["0:1", "16:2.5"], ["0:0.3", "17:3"]])
@pytest.mark.parametrize("length", [1, 7, 16, 40])
@pytest.mark.parametrize("name", LENGTHS)
def test_samples_are_those_of_the_rule(corpora, name, length, weights):
    documents = corpora(LENGTHS[name])
    upsampling = None if weights is None else LengthUpsampling.parse(weights)
    wanted = expected(documents, length, 3, 12, upsampling)
    samples = samples_of(documents, length, weights=weights)
    for i in range(len(wanted) - 1):
        sample = samples.sample(i)
        assert sample.dtype == np.int64 and sample.shape == (length + 1,)
        assert sample[:-1].tolist() == wanted[i]
        document, place = divmod(int(sample[-2]), BASE)
        # The token after a document's last one is where another begins; else the document's next.
        if place + 1 < documents.lengths[document]:
            assert sample[-1] == sample[-2] + 1
        else:
            assert 0 <= sample[-1] < BASE * documents.num_documents
    if len(wanted) > 1:  # any order of reading, from anywhere
        fresh = samples_of(documents, length, weights=weights)
        for i in np.random.default_rng(0).integers(0, len(wanted) - 1, 20):
            low, high = sorted(np.random.default_rng(i).integers(0, length + 2, 2))
            assert fresh.sample(i, low, high).tolist() == samples.sample(i)[low:high].tolist()


def test_every_token_of_an_epoch_once_and_every_next_one_predicted(corpora):
    documents = corpora(LENGTHS["mixed"])
    samples = samples_of(documents)
    epochs = 16  # so that the rests end with a sample, whatever their number
    count = sum(LENGTHS["mixed"])
    pairs = [
        (int(token), int(label))
        for i in range(epochs * count // 16)
        for token, label in zip(samples.sample(i)[:-1], samples.sample(i)[1:], strict=True)
    ]
    tokens, times = np.unique([token for token, _ in pairs], return_counts=True)
    assert len(tokens) == count and (times == epochs).all()
    for token, label in pairs:
        document, place = divmod(token, BASE)
        if place + 1 < documents.lengths[document]:
            assert label == token + 1


def test_long_documents_have_samples_of_their_own(corpora):
    documents = corpora(LENGTHS["mixed"])
    samples = samples_of(documents)
    begins = [int(samples.sample(i)[0]) for i in range(samples.samples_per_epoch)]
    own = {d * BASE + t for d, n in enumerate(LENGTHS["mixed"]) for t in range(0, n - 15, 16)}
    assert own <= set(begins)


def test_another_length_goes_on_at_the_same_place_of_the_order(corpora):
    """All but fewer than N tokens of what came before are the same documents of the order."""
    documents = corpora(LENGTHS["mixed"])
    stream = TokenStream(documents, range(len(LENGTHS["mixed"])), 16, 3)
    for length in (5, 16, 40):
        samples = samples_of(documents, length)
        for i in range(1, 20):
            seen = {int(t) for j in range(i) for t in samples.sample(j)[:-1]}
            order = {int(t) for t in stream.tokens(0, i * length)}
            if i * length <= stream.tokens_per_epoch:
                assert len(order - seen) < 2 * length


@pytest.mark.parametrize("name", ["mixed", "short", "long"])
def test_document_bounds(corpora, name):
    documents = corpora(LENGTHS[name])
    samples = samples_of(documents)
    for i in range(30):
        tokens = samples.sample(i)[:-1]
        first, stop = samples.document_bounds(i)
        assert first.dtype == stop.dtype == np.int32
        # A new run begins where the next token is not the document's next one.
        new = np.flatnonzero(np.diff(tokens, prepend=-9) != 1)
        runs = np.searchsorted(new, np.arange(16), side="right") - 1
        assert first.tolist() == new[runs].tolist()
        assert stop.tolist() == np.append(new, 16)[runs + 1].tolist()
        for low, high in [(0, 0), (3, 16), (5, 9)]:
            part = samples.document_bounds(i, low, high)
            assert part[0].tolist() == first[low:high].tolist()
            assert part[1].tolist() == stop[low:high].tolist()


def test_ids_beyond_the_vocabulary_are_named(corpora):
    documents = corpora(LENGTHS["mixed"])
    samples = DocumentSamples(TokenStream(documents, range(14), 16, 3, vocab_size=6100))
    with pytest.raises(ValueError, match=r"token id \d+ \(its token \d+\), but .* 6100 ids"):
        for i in range(samples.samples_per_epoch):
            samples.sample(i)


@pytest.mark.parametrize("mode", ["stream", "document"])
@pytest.mark.parametrize("name", ["mixed", "long"])
def test_context_report_counts_the_tokens_before_each(corpora, name, mode):
    documents, length = corpora(LENGTHS[name]), 7
    stream = TokenStream(documents, range(documents.num_documents), length, 3)
    samples = stream if mode == "stream" else DocumentSamples(stream)
    assert stream.tokens_per_epoch % length == 0
    context = []
    for i in range(stream.tokens_per_epoch // length):
        tokens = samples.sample(i)[:-1]
        new = np.flatnonzero(np.diff(tokens, prepend=-9) != 1)
        places = np.arange(length)
        context += (places - new[np.searchsorted(new, places, side="right") - 1]).tolist()
    report = samples.context_report()
    assert report.bounds == (3,)
    assert report.with_context[0] == pytest.approx(np.mean(np.array(context) >= 3))
    assert report.mean == pytest.approx(np.mean(context))
    lengths = documents.lengths
    assert report.uncut[0] == pytest.approx((lengths - 3).clip(min=0).sum() / lengths.sum())
