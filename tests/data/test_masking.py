"""Masks: as many as asked for, and the same whoever reads them, from wherever."""

from itertools import islice

import numpy as np
import pytest
import torch

from megalong.data.batches import IGNORE_INDEX, Masking, evaluation_batches, training_batches
from megalong.data.indexed import IndexedDocuments
from megalong.data.stream import TokenStream
from megalong.data.tokenizers.tokenizer import ByteTokenizer

N, EOD, MASK = 20, 256, 257
MASKING = Masking.of(ByteTokenizer().with_mask(), 0.3)


@pytest.fixture
def stream(write_documents) -> TokenStream:
    """Twenty documents, 213 tokens, an epoch of ten samples and a part of one."""
    draw = np.random.default_rng(0)
    documents = [[*draw.integers(0, 256, 9), EOD] for _ in range(19)] + [[*range(22), EOD]]
    return TokenStream(IndexedDocuments(write_documents(documents)), range(20), N, seed=2)


def training(stream, consumed=0, *, micro=2, rank=0, size=1, part=None, masking=MASKING):
    return training_batches(
        stream, consumed_samples=consumed, global_batch_size=8, micro_batch_size=micro,
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
def test_every_layout_masks_the_same(stream, size, micro):
    """Tokens and labels of three steps, cut into two shards, and the predictions of a step."""
    whole = list(islice(training(stream, micro=8), 3))
    for step, expected in enumerate(whole):
        predicted = 0
        for rank in range(size):
            for part in ((0, 7), (7, N)):
                batches = training(stream, 8 * step, micro=micro, rank=rank, size=size, part=part)
                mine = list(islice(batches, 8 // size // micro))
                assert len({int(batch["predicted"]) for batch in mine}) == 1
                predicted += int(mine[0]["predicted"])
                for m, batch in enumerate(mine):
                    first = (m * size + rank) * micro
                    for name in ("tokens", "labels"):
                        there = expected[name][first : first + micro, slice(*part)]
                        assert torch.equal(batch[name], there)
        assert predicted == (expected["labels"] != IGNORE_INDEX).sum() == expected["predicted"]


def test_the_masked_tokens_are_those_of_the_stream_and_other_ones_in_each_epoch(stream):
    batches = list(islice(training(stream, micro=8), 3))
    places = []
    for step, batch in enumerate(batches):
        for j in range(8):
            tokens = torch.from_numpy(stream.sample(8 * step + j, 0, N))
            chosen = batch["labels"][j] != IGNORE_INDEX
            assert torch.equal(batch["labels"][j][chosen], tokens[chosen])
            assert torch.equal(batch["tokens"][j][~chosen], tokens[~chosen])
            places += chosen.tolist()
    epoch = stream.tokens_per_epoch
    assert places[:epoch] != places[epoch : 2 * epoch]


@pytest.mark.parametrize("micro, size", [(1, 1), (4, 1), (2, 3)])
def test_an_evaluation_masks_the_same_tokens_always(stream, micro, size):
    """Whatever the layout and the seed of the run; no token twice, where the last sample is filled
    up with the first tokens."""
    stream.order.shuffle = False
    found = {}
    for rank in range(size):
        batches = evaluation_batches(
            stream, micro_batch_size=micro, data_parallel_rank=rank, data_parallel_size=size,
            masking=MASKING,
        )  # fmt: skip
        for m, batch in enumerate(batches):
            for j in range(micro):
                sample = (m * size + rank) * micro + j
                for t, label in enumerate(batch["labels"][j].tolist()):
                    if label != IGNORE_INDEX:
                        found[sample * N + t] = label
                if sample == 10:  # 13 tokens, and the first 7
                    kept = batch["labels"][j] == IGNORE_INDEX
                    tokens = torch.from_numpy(stream.tokens(200, 220))
                    assert kept[13:].all() and (tokens == batch["tokens"][j])[:13][kept[:13]].all()
    epoch = stream.tokens(0, stream.tokens_per_epoch)
    assert all(epoch[place] == label for place, label in found.items())
    _, labels = MASKING.masked(epoch, 0, seed=0)
    assert sorted(found) == np.flatnonzero(labels != IGNORE_INDEX).tolist()


def test_what_fills_up_a_short_evaluation_shows_no_answer(stream):
    """Ten tokens in a sequence of twenty-five: what is masked is so in all of their copies."""
    short = TokenStream(stream.documents, range(1), 25, shuffle=False)

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
