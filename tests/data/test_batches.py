"""Batches: which samples go where, slices of the sequence, evaluation that counts every token."""

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
    num_evaluation_batches,
    training_batches,
)
from megalong.data.indexed import IndexedDocuments
from megalong.data.stream import TokenStream

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
