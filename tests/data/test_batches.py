"""Batches: which samples go where, slices of the sequence, evaluation that counts every token."""

import itertools
import threading
import time
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from megalong.data.batches import (
    IGNORE_INDEX,
    DocumentRules,
    Masking,
    evaluation_batches,
    made_ahead,
    num_evaluation_batches,
    training_batches,
)
from megalong.data.indexed import IndexedDocuments
from megalong.data.stream import TokenStream
from megalong.data.tokenizers.tokenizer import ByteTokenizer
from megalong.utils.errors import UserError

N = 12


@pytest.fixture
def stream(write_documents) -> TokenStream:
    """Token values are their place in the file, so that each is unique in an epoch."""
    documents = [list(range(7 * i, 7 * i + 7)) for i in range(25)]
    return TokenStream(IndexedDocuments(write_documents(documents)), range(25), N, seed=2)


def training(stream, consumed, *, batch=8, micro=2, rank=0, size=1, part=None):
    return training_batches(
        stream,
        consumed_samples=consumed,
        global_batch_size=batch,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        sequence_range=part,
    )


def test_batch_is_the_samples_and_their_successors(stream):
    batch = next(training(stream, 3))
    assert set(batch) == {"tokens", "labels", "positions"}
    for tensor in batch.values():
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu"
    for j in range(2):
        assert batch["tokens"][j].tolist() == stream.sample(3 + j, 0, N).tolist()
        assert batch["labels"][j].tolist() == stream.sample(3 + j, 1, N + 1).tolist()
    assert batch["positions"].tolist() == list(range(N))


@pytest.mark.parametrize("size, micro", [(1, 1), (1, 8), (2, 2), (4, 2), (2, 4), (8, 1)])
def test_a_global_batch_is_the_same_samples_in_any_layout(stream, size, micro):
    consumed, batch = 5, 8
    per_rank = batch // (size * micro)
    ranks = [
        list(islice(training(stream, consumed, micro=micro, rank=d, size=size), 3 * per_rank))
        for d in range(size)
    ]
    for step in range(3):
        for m in range(per_rank):
            for d in range(size):
                for j in range(micro):
                    sample = consumed + step * batch + (m * size + d) * micro + j
                    tokens = ranks[d][step * per_rank + m]["tokens"][j]
                    assert tokens.tolist() == stream.sample(sample, 0, N).tolist()


def test_resuming_continues_where_it_stopped(stream):
    whole = list(islice(training(stream, 0), 40))
    for consumed in (8, 16, 64):
        resumed = islice(training(stream, consumed), 40 - consumed // 2)
        for one, other in zip(whole[consumed // 2 :], resumed, strict=True):
            assert torch.equal(one["tokens"], other["tokens"])


def test_sequence_ranks_together_have_the_whole_sequence(stream):
    whole = next(training(stream, 4))
    parts = [next(training(stream, 4, part=(k, k + 4))) for k in (0, 4, 8)]
    for name in ("tokens", "labels", "positions"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=-1), whole[name])


def test_training_refuses_what_does_not_fit(stream):
    with pytest.raises(ValueError, match="--global-batch-size 8"):
        training(stream, 0, micro=3)
    with pytest.raises(ValueError, match="--global-batch-size 8"):
        training(stream, 0, micro=2, size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        training(stream, 0, rank=2, size=2)
    with pytest.raises(ValueError, match="consumed_samples -1"):
        training(stream, -1)
    for part in [(0, 13), (5, 5), (-1, 3)]:
        with pytest.raises(ValueError, match="sequence range"):
            training(stream, 0, part=part)


@pytest.mark.parametrize("micro, size", [(1, 1), (4, 1), (2, 3), (3, 2), (100, 2)])
@pytest.mark.parametrize("slices", [1, 3])
def test_evaluation_predicts_every_token_but_the_first_once(stream, micro, size, slices):
    stream.order.shuffle = False
    width = N // slices
    predicted = Counter()
    counts = set()
    for d in range(size):
        for k in range(slices):
            batches = list(
                evaluation_batches(
                    stream,
                    micro_batch_size=micro,
                    data_parallel_rank=d,
                    data_parallel_size=size,
                    sequence_range=(k * width, (k + 1) * width),
                )
            )
            counts.add(len(batches))
            for batch in batches:
                assert batch["tokens"].shape == batch["labels"].shape == (micro, width)
                assert batch["positions"].tolist() == list(range(k * width, (k + 1) * width))
                valid = batch["labels"] != IGNORE_INDEX
                predicted.update(batch["labels"][valid].tolist())
                # Tokens are their own place here, so that each label is the next place.
                assert torch.equal(batch["tokens"][valid] + 1, batch["labels"][valid])
                assert batch["tokens"].min() >= 0
    expected = stream.tokens(1, stream.tokens_per_epoch).tolist()
    assert predicted == Counter(expected) and len(expected) == 174
    assert counts == {
        num_evaluation_batches(stream, micro_batch_size=micro, data_parallel_size=size)
    }


def test_evaluation_of_a_few_samples(stream):
    def labels(num_samples):
        return [
            label
            for d in range(2)
            for batch in evaluation_batches(
                stream,
                num_samples=num_samples,
                micro_batch_size=2,
                data_parallel_rank=d,
                data_parallel_size=2,
            )
            for label in batch["labels"].flatten().tolist()
            if label != IGNORE_INDEX
        ]

    assert sorted(labels(5)) == sorted(stream.tokens(1, 5 * N + 1).tolist())
    assert labels(10**6) == labels(None)
    assert labels(0) == []


def test_a_split_shorter_than_a_sequence(write_documents):
    documents = IndexedDocuments(write_documents([[4, 5, 6], [7]]))
    options = {"micro_batch_size": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
    short = TokenStream(documents, range(1), N, shuffle=False)
    (batch,) = evaluation_batches(short, **options)
    assert batch["labels"][0].tolist() == [5, 6] + [IGNORE_INDEX] * (N - 2)
    assert batch["tokens"][0].tolist() == [4, 5, 6] + [0] * (N - 3)
    with pytest.raises(ValueError, match=r"nothing to predict.*--split"):
        evaluation_batches(TokenStream(documents, range(1, 2), N), **options)


def bounds_by_hand(stream, first, samples):
    """By sample, of its places, from the tokens: 25 documents of 7 consecutive ones."""
    tokens = stream.tokens(first * N, (first + samples) * N)
    position = np.arange(first * N, (first + samples) * N)
    starts = (position - tokens % 7).reshape(samples, N) - N * np.arange(first, first + samples)[
        :, None
    ]
    return starts.clip(0), (starts + 7).clip(max=N)


def test_isolated_batches_say_where_documents_are(stream):
    rules = DocumentRules(isolated=True)
    sizes = {"global_batch_size": 8, "micro_batch_size": 2}
    rank = {"data_parallel_rank": 1, "data_parallel_size": 2}
    for masking in (None, Masking(0.3, 500, np.ones(501, bool))):
        batch = next(
            training_batches(
                stream, consumed_samples=12, sequence_range=(3, 9), masking=masking,
                documents=rules, **sizes, **rank,
            )
        )  # fmt: skip
        starts, stops = bounds_by_hand(stream, 14, 2)  # over the end of the first epoch, at 14.6
        assert batch["document_start"].dtype == torch.int32
        assert np.array_equal(batch["document_start"], starts[:, 3:9])
        assert ("document_stop" in batch) == (masking is not None)
        if masking is not None:
            assert np.array_equal(batch["document_stop"], stops[:, 3:9])


@pytest.mark.parametrize("masked", [False, True])
def test_in_evaluation_padding_is_of_no_document(stream, masked):
    """175 tokens are 14 samples of 12, and 7 tokens of the last one."""
    stream.order.shuffle = False
    batches = list(
        evaluation_batches(
            stream, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1,
            masking=Masking(0.3, 500, np.ones(501, bool)) if masked else None,
            documents=DocumentRules(isolated=True),
        )
    )  # fmt: skip
    starts = torch.cat([batch["document_start"] for batch in batches])
    assert starts.shape == (16, N)
    assert np.array_equal(starts[:14], bounds_by_hand(stream, 0, 14)[0])
    assert starts[14].tolist() == [0] * 7 + [7] * 5
    assert (starts[15].diff() >= 0).all()


def test_nothing_is_predicted_from_the_end_of_a_document(stream):
    """As Megatron's --eod-mask-loss: where it is the input. How many predictions there are, the
    whole step is told."""
    eod = int(stream.sample(1)[5])
    rules = DocumentRules(unpredicted_from=eod)
    batches = training_batches(
        stream, consumed_samples=0, global_batch_size=4, micro_batch_size=2, data_parallel_rank=0,
        data_parallel_size=1, documents=rules,
    )  # fmt: skip
    first, second = next(batches), next(batches)
    silent = first["labels"] == IGNORE_INDEX
    assert torch.equal(silent, first["tokens"] == eod) and silent.sum() == 1
    assert first["predicted"] == second["predicted"] == 4 * N - 1
    for _ in range(3):  # later steps: each micro batch is told the sum over its step
        pair = next(batches), next(batches)
        found = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in pair)
        assert [batch["predicted"] for batch in pair] == [found, found]
    assert not (second["labels"] == IGNORE_INDEX).any()
    held_out = next(
        evaluation_batches(
            stream, micro_batch_size=4, data_parallel_rank=0, data_parallel_size=1, documents=rules
        )
    )
    assert torch.equal(held_out["labels"] == IGNORE_INDEX, held_out["tokens"] == eod)


M, EOD, MASK = 20, 256, 257
MASKING = Masking.of(ByteTokenizer().with_mask(), 0.3)


@pytest.fixture
def stream_m(write_documents) -> TokenStream:
    """Twenty documents, 213 tokens, an epoch of ten samples and a part of one."""
    draw = np.random.default_rng(0)
    documents = [[*draw.integers(0, 256, 9), EOD] for _ in range(19)] + [[*range(22), EOD]]
    return TokenStream(IndexedDocuments(write_documents(documents)), range(20), M, seed=2)


def train_m(stream_m, consumed=0, *, micro=2, rank=0, size=1, part=None, masking=MASKING):
    return training_batches(
        stream_m, consumed_samples=consumed, global_batch_size=8, micro_batch_size=micro,
        data_parallel_rank=rank, data_parallel_size=size, sequence_range=part, masking=masking,
    )  # fmt: skip


def test_how_many_are_masked_and_what_stands_there():
    tokens = np.random.default_rng(0).integers(0, 257, 200_000)
    seen, labels = MASKING.masked(tokens, 7, seed=5)
    chosen, is_text = labels != IGNORE_INDEX, tokens != EOD
    assert not chosen[~is_text].any()
    assert chosen[is_text].mean() == pytest.approx(0.3, abs=0.005)
    assert (labels[chosen] == tokens[chosen]).all() and (seen[~chosen] == tokens[~chosen]).all()
    masked, kept = seen[chosen] == MASK, seen[chosen] == tokens[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1, abs=0.01)
    others = np.bincount(seen[chosen][~masked & ~kept], minlength=258)
    assert others[:256].min() > 0 and others[256:].sum() == 0  # any token of text
    # The chosen are no more often beside each other than chance has it.
    both = (chosen[1:] & chosen[:-1])[is_text[1:] & is_text[:-1]].mean()
    assert both == pytest.approx(0.09, abs=0.005)


def test_masks_hang_on_seed_and_place_alone():
    tokens = np.random.default_rng(1).integers(0, 257, 1000)
    whole = np.stack(MASKING.masked(tokens, 10**12 + 1, seed=3))
    for start, stop in ((0, 1), (1, 8), (3, 500), (998, 1000), (5, 5)):
        part = np.stack(MASKING.masked(tokens[start:stop], 10**12 + 1 + start, seed=3))
        assert (part == whole[:, start:stop]).all()
    for begin, seed in ((10**12 + 2, 3), (10**12 + 1, 4)):
        assert (np.stack(MASKING.masked(tokens, begin, seed)) != whole).any()


def test_the_draws_stay_what_they_are():
    """A run goes on with the masks that it began with, whatever the versions of its libraries."""
    _, labels = MASKING.masked(np.full(40, 65), 2**33 + 1, seed=1234)
    assert np.flatnonzero(labels == 65).tolist() == [
        3,
        5,
        6,
        9,
        14,
        15,
        17,
        18,
        21,
        22,
        23,
        26,
        28,
        30,
        31,
        35,
        38,
    ]


@pytest.mark.parametrize("size, micro", [(1, 1), (1, 8), (2, 2), (4, 1)])
def test_every_layout_masks_the_same(stream_m, size, micro):
    """Tokens and labels of three steps, cut into two shards, and the predictions of a step."""
    whole = list(islice(train_m(stream_m, micro=8), 3))
    for step, expected in enumerate(whole):
        predicted = 0
        for rank in range(size):
            for part in ((0, 7), (7, M)):
                batches = train_m(stream_m, 8 * step, micro=micro, rank=rank, size=size, part=part)
                mine = list(islice(batches, 8 // size // micro))
                assert len({int(batch["predicted"]) for batch in mine}) == 1
                predicted += int(mine[0]["predicted"])
                for m, batch in enumerate(mine):
                    first = (m * size + rank) * micro
                    for name in ("tokens", "labels"):
                        there = expected[name][first : first + micro, slice(*part)]
                        assert torch.equal(batch[name], there)
        assert predicted == (expected["labels"] != IGNORE_INDEX).sum() == expected["predicted"]


def test_the_masked_tokens_are_those_of_the_stream_and_other_ones_in_each_epoch(stream_m):
    batches = list(islice(train_m(stream_m, micro=8), 3))
    places = []
    for step, batch in enumerate(batches):
        for j in range(8):
            tokens = torch.from_numpy(stream_m.sample(8 * step + j, 0, M))
            chosen = batch["labels"][j] != IGNORE_INDEX
            assert torch.equal(batch["labels"][j][chosen], tokens[chosen])
            assert torch.equal(batch["tokens"][j][~chosen], tokens[~chosen])
            places += chosen.tolist()
    epoch = stream_m.tokens_per_epoch
    assert places[:epoch] != places[epoch : 2 * epoch]


@pytest.mark.parametrize("micro, size", [(1, 1), (4, 1), (2, 3)])
def test_an_evaluation_masks_the_same_tokens_always(stream_m, micro, size):
    """Whatever the layout and the seed of the run; no token twice, where the last sample is filled
    up with the first tokens."""
    stream_m.order.shuffle = False
    found = {}
    for rank in range(size):
        batches = evaluation_batches(
            stream_m, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size,
            masking=MASKING,
        )  # fmt: skip
        for m, batch in enumerate(batches):
            for j in range(micro):
                sample = (m * size + rank) * micro + j
                for t, label in enumerate(batch["labels"][j].tolist()):
                    if label != IGNORE_INDEX:
                        found[sample * M + t] = label
                if sample == 10:  # 13 tokens, and the first 7
                    kept = batch["labels"][j] == IGNORE_INDEX
                    tokens = torch.from_numpy(stream_m.tokens(200, 220))
                    assert kept[13:].all() and (tokens == batch["tokens"][j])[:13][kept[:13]].all()
    epoch = stream_m.tokens(0, stream_m.tokens_per_epoch)
    assert all(epoch[place] == label for place, label in found.items())
    _, labels = MASKING.masked(epoch, 0, seed=0)
    assert sorted(found) == np.flatnonzero(labels != IGNORE_INDEX).tolist()


def test_what_fills_up_a_short_evaluation_shows_no_answer(stream_m):
    """Ten tokens in a sequence of twenty-five: what is masked is so in all of their copies."""
    short = TokenStream(stream_m.documents, range(1), 25, shuffle=False)

    def read(part=None):
        [batch] = evaluation_batches(
            short, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1,
            sequence_range=part, masking=MASKING,
        )  # fmt: skip
        return batch["tokens"][0].tolist(), batch["labels"][0].tolist()

    tokens, labels = read()
    assert MASK in tokens and set(labels[10:]) == {IGNORE_INDEX}
    assert tokens == (3 * tokens[:10])[:25]
    assert read((7, 23)) == (tokens[7:23], labels[7:23])


CPU = torch.device("cpu")


def numbered(count, on_made=lambda number: None):
    """Batches that hold their number."""
    for number in range(count):
        on_made(number)
        yield {"tokens": torch.tensor([number])}


def numbers(batches):
    return [int(batch["tokens"]) for batch in batches]


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not data_threads()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_all_in_their_order(count):
    with made_ahead(numbered(count), CPU) as batches:
        assert numbers(batches) == list(range(count))
        assert numbers(batches) == []  # it stays at its end


def test_the_same_as_without_it(write_documents):
    """Bit for bit, from wherever a run goes on."""
    documents = IndexedDocuments(write_documents([list(range(i, 9 * i + 3)) for i in range(20)]))
    for consumed in (0, 6):
        plain, ahead = (
            training_batches(
                TokenStream(documents, range(20), 16, seed=3),
                consumed_samples=consumed,
                global_batch_size=6,
                micro_batch_size=3,
                data_parallel_rank=1,
                data_parallel_size=2,
            )
            for _ in range(2)
        )
        with made_ahead(ahead, CPU) as batches:
            for one, other in itertools.islice(zip(plain, batches, strict=False), 5):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_is_made_ahead_and_no_more():
    made = []
    with made_ahead(numbered(9, made.append), CPU) as batches:
        for taken in range(3):
            next(batches)
            wait_until(lambda taken=taken: len(made) == taken + 2)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def test_an_error_comes_where_its_batch_would_have_come():
    def broken():
        yield from numbered(2)
        raise UserError("--data-path data: the disk is gone")

    with made_ahead(broken(), CPU) as batches:
        assert numbers(itertools.islice(batches, 2)) == [0, 1]
        with pytest.raises(UserError, match="--data-path data: the disk is gone"):
            next(batches)


def test_an_error_of_the_training_ends_the_thread():
    with pytest.raises(ZeroDivisionError), made_ahead(numbered(9), CPU) as batches:
        next(batches)
        raise ZeroDivisionError


def test_batches_for_a_gpu_are_pinned_by_a_thread_on_that_gpu(monkeypatch):
    devices, pinned = [], []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: devices.append((gpu, threading.current_thread().name))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with made_ahead(numbered(2), torch.device("cuda", 3)) as batches:
        assert numbers(batches) == [0, 1] and len(pinned) == 2
    [(gpu, thread)] = devices
    assert gpu == torch.device("cuda", 3) and thread.startswith("data")


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
