"""Held-out numbers against the same sums done by hand, on one rank and on two."""

import math

import numpy as np
import pytest
import torch

from megalong.data.batches import IGNORE_INDEX
from megalong.evals.scores import position_edges
from megalong.training.evaluation import evaluate


class KnownLosses:
    """In the engine's place: the loss of a label is the label itself, in nats."""

    seq_length = 24

    def token_losses(self, batches):
        masks = [batch["labels"] != IGNORE_INDEX for batch in batches]
        return [(b["labels"].float() * mask, mask) for b, mask in zip(batches, masks, strict=True)]


class OneRank:
    device = torch.device("cpu")
    pipeline_parallel_size = 1

    def sum_of_losses(self, tensor):
        return tensor


@pytest.mark.parametrize(
    "seq_length, edges",
    [
        (1, [0, 1]),
        (4, [0, 4]),
        (5, [0, 4, 5]),
        (24, [0, 4, 6, 8, 12, 16, 24]),
        (2048, [0, *sorted(x for k in range(2, 11) for x in (2**k, 3 * 2 ** (k - 1))), 2048]),
    ],
)
def test_position_edges(seq_length, edges):
    assert position_edges(seq_length) == edges


def test_sums_by_hand():
    generator = np.random.default_rng(0)
    labels = generator.integers(1, 9, (5, 24))
    labels[3, 10:] = IGNORE_INDEX
    labels[4] = IGNORE_INDEX
    batches = [
        {"labels": torch.from_numpy(part), "positions": torch.arange(24)}
        for part in (labels[:2], labels[2:4], labels[4:])
    ]
    token_bytes = generator.integers(0, 5, 9)
    result = evaluate(KnownLosses(), batches, token_bytes, OneRank())

    counted = labels[labels != IGNORE_INDEX]
    assert result.tokens == counted.size
    assert result.loss == pytest.approx(counted.mean(), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(counted.mean()), rel=1e-12)
    bits = counted.sum() / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / token_bytes[counted].sum(), rel=1e-12)
    edges = position_edges(24)
    for start, stop, loss in zip(edges, edges[1:], result.loss_by_position, strict=False):
        part = labels[:, start:stop]
        assert loss == pytest.approx(part[part != IGNORE_INDEX].mean(), rel=1e-12)


def test_positions_of_documents_apart_count_from_their_beginnings():
    labels = torch.ones(2, 24, dtype=torch.long)
    labels[0, 5], labels[1, 3] = 9, 5
    starts = torch.zeros(2, 24, dtype=torch.int32)
    starts[0, 5:], starts[1, 2:] = 5, 2
    batch = {"labels": labels, "positions": torch.arange(24), "document_start": starts}
    result = evaluate(KnownLosses(), [batch], np.ones(10), OneRank())
    first = 4 + 4 + 2 + 4  # predictions at the first four places of four documents
    assert result.loss_by_position[:2] == [(first + 8 + 4) / first, 1.0]
    assert result.loss == (48 + 8 + 4) / 48


def test_without_a_byte_of_text_there_are_no_bits_per_byte():
    batch = {"labels": torch.ones(1, 24, dtype=torch.long), "positions": torch.arange(24)}
    assert evaluate(KnownLosses(), [batch], np.zeros(9), OneRank()).bits_per_byte is None


def test_a_bucket_without_predictions_has_no_loss():
    labels = torch.full((1, 24), IGNORE_INDEX)
    labels[0, :5] = 1
    batch = {"labels": labels, "positions": torch.arange(24)}
    result = evaluate(KnownLosses(), [batch], np.ones(9), OneRank())
    assert result.loss_by_position == [1.0, 1.0, None, None, None, None]
