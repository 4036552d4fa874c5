"""The order of the token stream, what a sample is, and that neither depends on anything else."""

import multiprocessing
import os
import time
from functools import partial
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from megalong.data import document_order
from megalong.data.batches import training_batches
from megalong.data.document_order import IndexCache
from megalong.data.indexed import IndexedDocuments
from megalong.data.stream import TokenStream, split_documents
from megalong.utils.errors import UserError


@pytest.fixture
def documents(write_documents) -> IndexedDocuments:
    """40 documents of 0 to 29 tokens; token values are unique: their place in the file."""
    lengths = np.random.default_rng(5).integers(0, 30, 40)
    lengths[[0, 7, 39]] = 0
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return IndexedDocuments(write_documents([list(range(a, b)) for a, b in pairwise(starts)]))


@pytest.mark.parametrize("split", ["969,30,1", "1", "90,10", "1,1,1", "0,0,5", "99.5,0.5", "8,1,1"])
@pytest.mark.parametrize("num_documents", [1, 2, 3, 10, 999, 123_457])
def test_split_is_megatrons(split, num_documents):
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    expected = []
    for bounds in matrix:
        low, high = bounds if bounds is not None else (1.0, 1.0)
        expected.append((round(low * num_documents), round(high * num_documents)))
    ranges = split_documents(num_documents, split)
    for part, (low, high) in zip(ranges, expected, strict=True):
        assert len(part) == high - low
        assert not part or (part.start, part.stop) == (low, high)
    assert sum(map(len, ranges)) == num_documents


@pytest.mark.parametrize(
    "split", ["", "a,b", "1,,2", "1;2", "1,2,3,4", "-1,2", "0,0", "nan", "inf,1"]
)
def test_bad_splits_name_the_flag(split):
    with pytest.raises(ValueError, match="--split"):
        split_documents(10, split)


def test_an_epoch_has_every_token_once_with_documents_whole(documents):
    part = range(3, 30)
    stream = TokenStream(documents, part, 16, seed=1)
    size = stream.tokens_per_epoch
    assert size == documents.lengths[3:30].sum()
    assert stream.samples_per_epoch == (size - 1) // 16
    expected = [token for i in part for token in documents.read(i)]
    epochs = [stream.tokens(e * size, (e + 1) * size) for e in range(4)]
    for tokens in epochs:
        assert tokens.dtype == np.int64
        assert sorted(tokens) == expected and tokens.tolist() != expected
        # Inside a document the next token follows; there are as many breaks as documents.
        breaks = int((np.diff(tokens) != 1).sum())
        assert breaks <= int((documents.lengths[3:30] > 0).sum()) - 1
    assert len({tuple(tokens) for tokens in epochs}) == 4


def test_order_is_fixed_for_all_time():
    """A run must resume into the same order after an upgrade of numpy, or of megalong."""

    class Ten:
        prefix, lengths, max_token_id = "ten", np.ones(10, np.int64), None

        def read(self, document, start, stop):
            return np.full(stop - start, document)

    stream = TokenStream(Ten(), range(10), 10, seed=1234)
    assert stream.tokens(0, 20).tolist() == [
        *(5, 6, 3, 9, 7, 4, 1, 2, 8, 0),
        *(9, 2, 0, 7, 6, 1, 8, 4, 5, 3),
    ]


def test_samples_overlap_by_one_token_and_cross_epochs(documents):
    stream = TokenStream(documents, range(40), 50, seed=3)
    for i in range(3 * stream.samples_per_epoch):
        sample = stream.sample(i)
        assert sample.shape == (51,)
        assert sample.tolist() == stream.tokens(50 * i, 50 * i + 51).tolist()
        assert sample[-1] == stream.sample(i + 1)[0]


def test_slices_are_parts_of_the_sample_in_any_order_of_reading(documents):
    stream = TokenStream(documents, range(40), 64, seed=3)
    whole = [stream.sample(i) for i in range(30)]
    fresh = TokenStream(documents, range(40), 64, seed=3)
    random = np.random.default_rng(0)
    for i in random.permutation(30):
        low, high = sorted(random.integers(0, 66, 2))
        assert fresh.sample(i, low, high).tolist() == whole[i][low:high].tolist()
    assert fresh.sample(3, 64).tolist() == whole[3][64:].tolist()


def test_a_slice_reads_only_what_it_must(documents, monkeypatch):
    stream = TokenStream(documents, range(40), 400, seed=3)
    read = []
    original = IndexedDocuments.read

    def counted(self, document, start, stop):
        read.append(stop - start)
        return original(self, document, start, stop)

    monkeypatch.setattr(IndexedDocuments, "read", counted)
    stream.sample(1, 100, 120)
    assert sum(read) == 20


def test_wrong_ids_are_named(documents, write_documents):
    with pytest.raises(ValueError, match=r"token id \d+, but .* 100 ids.*--tokenizer-model"):
        TokenStream(documents, range(40), 8, vocab_size=100)

    # Without a sidecar only reading shows it.
    documents.max_token_id = None
    stream = TokenStream(documents, range(40), 8, shuffle=False, vocab_size=100)
    assert stream.tokens(0, 100).tolist() == list(range(100))
    document = int(np.searchsorted(np.cumsum(documents.lengths), 100, side="right"))
    inside = 100 - int(documents.lengths[:document].sum())
    with pytest.raises(
        ValueError, match=rf"document {document} of .* token id 100 \(its token {inside}\)"
    ):
        stream.tokens(90, 110)

    negative = IndexedDocuments(write_documents([[1, -3, 2]], name="negative", dtype=np.int32))
    with pytest.raises(ValueError, match="token id -3"):
        TokenStream(negative, range(1), 2, vocab_size=100).sample(0)


def test_an_empty_part_names_the_flag(documents):
    for part in (range(5, 5), range(39, 40), range(40, 40)):
        with pytest.raises(ValueError, match="--split is empty"):
            TokenStream(documents, part, 8)


def test_bad_arguments(documents):
    with pytest.raises(ValueError, match="--seq-length 0"):
        TokenStream(documents, range(40), 0)
    with pytest.raises(ValueError, match="--seed -1"):
        TokenStream(documents, range(40), 8, -1)
    stream = TokenStream(documents, range(40), 8)
    for arguments in [(-1,), (0, 0, 10), (0, 5, 4), (0, -1, 4)]:
        with pytest.raises(IndexError):
            stream.sample(*arguments)


@pytest.mark.parametrize("length", [7, 16, 1000])
def test_bounds_are_those_of_the_documents(documents, length):
    """Samples shorter than documents, and longer than two epochs; empty documents are nowhere."""
    stream = TokenStream(documents, range(40), length, seed=3)
    starts, ends = [], []
    for epoch in range(4):
        for document in stream.order.epoch(epoch):
            size, begin = int(documents.lengths[document]), len(starts)
            starts += [begin] * size
            ends += [begin + size] * size
    whole = np.array([starts, ends])
    for i in range(whole.shape[1] // length):
        position = i * length
        expected = (whole[:, position : position + length] - position).clip(0, length)
        found = stream.document_bounds(i)
        assert [x.dtype for x in found] == [np.int32] * 2
        assert np.array_equal(found, expected)
        start, stop = length // 3, length // 3 + max(length // 2, 1)
        part = stream.document_bounds(i, start, stop)
        assert np.array_equal(part, expected[:, start:stop])
        assert stream.document_bounds(i, 3, 3)[0].shape == (0,)
    for start, stop in [(0, length + 1), (3, 2), (-1, 2)]:
        with pytest.raises(IndexError):
            stream.document_bounds(0, start, stop)


def test_bounds_of_a_million_documents_read_no_token():
    class Tiny:
        """Documents of one token, and every tenth of none; which nobody may read."""

        prefix, max_token_id = "tiny", None
        lengths = np.resize(np.array([1] * 9 + [0]), 1_200_000)
        num_documents = len(lengths)

    stream = TokenStream(Tiny(), range(Tiny.num_documents), 1_000_000, seed=1)
    first, stop = stream.document_bounds(0)
    assert np.array_equal(first, np.arange(1_000_000)) and np.array_equal(stop, first + 1)
    begin = time.perf_counter()
    stream.document_bounds(0)
    assert time.perf_counter() - begin < 1


class Ramps:
    """Documents whose tokens are their place among all: each token is unique in an epoch."""

    prefix = "ramps"
    max_token_id = vocab_size = prepend_bos = None
    masks_loss = False

    def __init__(self, lengths):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return self._starts[document] + np.arange(start, stop)


def random_documents(seed: int) -> Ramps:
    """Empty ones, of one token, of a few, and much longer than a sequence."""
    random = np.random.default_rng(seed)
    kinds = [0, 1, random.integers(2, 12), random.integers(100, 400)]
    chosen = random.choice(4, size=int(random.integers(2, 40)), p=random.dirichlet(np.ones(4)))
    lengths = [int(kinds[kind]) for kind in chosen]
    return Ramps([*lengths, 1, 7])


def run(stream, *, consumed=0, steps, batch=8, micro=1, ranks=1, shards=1):
    """Tokens and labels by sample, put together from what every rank reads."""
    width = stream.sequence_length // shards
    rows: dict[int, dict[int, tuple[list, list]]] = {}
    for rank in range(ranks):
        for shard in range(shards):
            batches = training_batches(
                stream,
                consumed_samples=consumed,
                global_batch_size=batch,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                sequence_range=(shard * width, (shard + 1) * width),
            )
            for m, part in enumerate(islice(batches, steps * batch // (micro * ranks))):
                for j in range(micro):
                    i = consumed + (m * ranks + rank) * micro + j
                    row = part["tokens"][j].tolist(), part["labels"][j].tolist()
                    assert shard not in rows.setdefault(i, {})
                    rows[i][shard] = row
    return {
        i: tuple(list(chain(*(of[shard][k] for shard in sorted(of)))) for k in range(2))
        for i, of in sorted(rows.items())
    }


@pytest.mark.parametrize("seed", range(12))
def test_every_token_of_an_epoch_once_in_order_with_its_successor_as_label(seed):
    documents, length = random_documents(seed), 12
    stream = TokenStream(documents, range(len(documents.lengths)), length, seed)
    epoch = stream.tokens_per_epoch
    steps = -(-2 * epoch // (8 * length)) + 1  # over two borders of epochs
    rows = run(stream, steps=steps)
    tokens = [token for of_sample, _ in rows.values() for token in of_sample]
    labels = [label for _, of_sample in rows.values() for label in of_sample]
    assert labels[:-1] == tokens[1:]
    for begin in (0, epoch):
        one = tokens[begin : begin + epoch]
        assert sorted(one) == list(range(epoch))
        # Documents are whole: behind a token comes the next one, unless the document ends.
        ends = set(np.cumsum(documents.lengths) - 1)
        assert all(b == a + 1 for a, b in pairwise(one) if a not in ends)
    for ranks, shards, micro in ((2, 4, 1), (4, 2, 2), (8, 1, 1), (1, 3, 8), (8, 12, 1)):
        assert run(stream, steps=steps, ranks=ranks, shards=shards, micro=micro) == rows


class Many:
    prefix, max_token_id = "many", None

    def __init__(self, seed: int = 0):
        self.lengths = np.random.default_rng(seed).integers(0, 9, 3000)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return document + np.arange(start, stop)


@pytest.fixture(autouse=True)
def three_thousand_are_many(monkeypatch):
    monkeypatch.setattr(document_order, "LARGE", 1000)


def stream(folder, documents=None, **options) -> TokenStream:
    cache = None if folder is None else IndexCache(str(folder))
    return TokenStream(documents or Many(), range(3000), 100, cache=cache, **options)


def test_the_order_is_that_without_a_cache(tmp_path):
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 1, "salt": 5}):
        kept, plain = stream(tmp_path, **options), stream(None, **options)
        for i in (0, 3, plain.samples_per_epoch + 1):
            assert kept.sample(i).tolist() == plain.sample(i).tolist()
    assert len(list(tmp_path.glob("*.npy"))) == 6  # two epochs of each
    stream(tmp_path, Many(1), seed=1).sample(0)  # other documents
    assert len(list(tmp_path.glob("*.npy"))) == 7
    stream(tmp_path, seed=1).sample(0)
    assert len(list(tmp_path.glob("*.npy"))) == 7 and not list(tmp_path.glob("*.partial"))


def test_a_broken_file_is_made_anew(tmp_path):
    expected = stream(tmp_path).sample(0).tolist()
    [file] = tmp_path.glob("*.npy")
    os.truncate(file, 200)
    assert stream(tmp_path).sample(0).tolist() == expected
    assert file.stat().st_size > 200


def test_small_ones_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(document_order, "LARGE", 3001)
    stream(tmp_path).sample(0)
    assert list(tmp_path.iterdir()) == []


def _sample(folder, made, results):
    document_order.LARGE = 1000
    original = TokenStream._index

    def counted(self, epoch):
        made.put(os.getpid())
        return original(self, epoch)

    TokenStream._index = counted
    results.put(stream(folder).sample(3).tolist())


def test_of_many_processes_one_makes_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    made, results = fork.Queue(), fork.Queue()
    ranks = [fork.Process(target=_sample, args=(tmp_path, made, results)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    samples = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert samples == [stream(None).sample(3).tolist()] * 6
    made.get(timeout=1)
    assert made.empty()


def test_a_folder_that_users_share(tmp_path, monkeypatch):
    """A lock of another user's can be read, and not written to."""
    (tmp_path / "lock").touch(0o444)
    monkeypatch.setattr(document_order.os, "open", partial(read_only, os.open))
    expected = stream(None).sample(0).tolist()
    assert stream(tmp_path).sample(0).tolist() == expected
    assert len(list(tmp_path.glob("*.npy"))) == 1


def read_only(open_file, path, flags, *mode):
    if str(path).endswith("lock") and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(path)
    return open_file(path, flags, *mode)


def test_a_folder_that_cannot_be_written():
    with pytest.raises(UserError, match=r"--data-cache-path /proc/x: cannot be made"):
        IndexCache("/proc/x")
