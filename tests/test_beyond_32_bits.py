"""Positions that 32 bits do not hold: a billion tokens over 1,024 ranks, and 2^33 of them.

Of the plan, the position encoding, the data and the losses by position; the kernels' own arithmetic
is in tests/attention/triton (`test_rows_that_are_far_apart`).
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from megalong.attention import DilatedPattern
from megalong.attention.dilated import sequence_parallel_attention
from megalong.attention.exchange import AllGather
from megalong.attention.sequence_parallel import remote_rows
from megalong.attention.sequence_plan import Shards, make_plan
from megalong.config import ModelConfig
from megalong.config.arguments import config_from_values
from megalong.data.batches import training_batches
from megalong.data.document_samples import DocumentSamples
from megalong.data.stream import TokenStream
from megalong.dry_run.share import answered, lone_rank, lone_sequence
from megalong.evals.scores import PositionLosses, position_edges
from megalong.hf.configuration_longnet import LongNetConfig
from megalong.hf.positions_longnet import rotary_angles
from megalong.model.rotary import LongRotaryEmbedding
from megalong.utils.errors import UserError

FAR = 2**33
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
HEADS, KV_HEADS = 4, 2
CPU = torch.device("cpu")
# The last rank has no row of the branches whose rates are above the shard's length; the one before
# that is a multiple of all rates has.
PLACES = [(2**30, 1024, 1023), (FAR, 8192, 8191), (FAR, 8192, 8176), (FAR, 2**14, 2**14 - 1)]


@pytest.mark.parametrize(("tokens", "ranks", "rank"), PLACES)
def test_remote_rows_are_those_of_the_definition(tokens, ranks, rank):
    """Every query's keys before the shard: those of its segment that take part in the branch."""
    pattern, shards = DilatedPattern.geometric(tokens), Shards(rank, ranks, tokens // ranks)
    plan = make_plan(pattern, shards, HEADS, KV_HEADS, True)
    found = {}
    for exchange in remote_rows(plan, CPU):
        for attention in exchange.attention:
            group = len(attention.heads) // len(attention.key_ranges)
            for place, head in enumerate(attention.heads.tolist()):
                ranges = attention.key_ranges[place // group]
                branch = pattern.dilation_rates.index(ranges[0].step)
                keys = [position for part in ranges for position in part]
                found[branch, head] = attention.query_rows[:, place].tolist(), keys
    expected = {}
    for branch, (width, rate) in enumerate(pattern.branches):
        start = shards.start // width * width
        for head, offset in enumerate(pattern.offsets(HEADS, KV_HEADS)[branch]):
            first = start + offset
            queries = range(first + -(-(shards.start - first) // rate) * rate, shards.stop, rate)
            keys = range(first, shards.start, rate)
            if start < shards.start and queries and keys:
                rows = [position - shards.start for position in queries]
                expected[branch, head] = rows, list(keys)
    assert found == expected
    assert len(found) >= 12


@pytest.mark.parametrize(("tokens", "ranks", "rank"), PLACES)
def test_a_rank_gets_what_the_others_send(tokens, ranks, rank):
    """Of the first rank, one in the middle and the neighbour: place by place."""
    pattern, length = DilatedPattern.geometric(tokens), tokens // ranks
    plan = make_plan(pattern, Shards(rank, ranks, length), HEADS, KV_HEADS, True)
    compared = 0
    for other in (0, ranks // 2, rank - 1):
        shards = Shards(other, ranks, length)
        theirs = make_plan(pattern, shards, HEADS, KV_HEADS, True)
        for exchange in plan.exchanges:
            for sender, rows in zip(theirs.exchanges, remote_rows(theirs, CPU), strict=True):
                if type(sender.collective) is not type(exchange.collective):
                    continue
                mine = [block for block in exchange.arriving.blocks if block.rank == other]
                if isinstance(exchange.collective, AllGather):
                    if sender.collective != exchange.collective or not mine:
                        continue
                    begin = other % exchange.collective.ranks * sender.leaving.length
                    origin = 0
                else:
                    begin = sum(exchange.collective.received[:other])
                    origin = sum(sender.collective.sent[:rank])
                for block in mine:
                    places = slice(
                        block.places.start - begin + origin, block.places.stop - begin + origin
                    )
                    sent = rows.leaving.positions[places].long() + shards.start
                    assert sent.tolist() == list(block.positions)
                    assert (rows.leaving.kv_heads[places] == block.rows.kv_head).all()
                    compared += len(sent)
    assert compared


class SameRows:
    """Neighbours whose rows hang on their places in the list alone."""

    def answer(self, exchanged):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(exchanged.result.shape, generator=generator, dtype=torch.float64)
        if exchanged.kind == "reduce_scatter":
            exchanged.result.add_(rows)
        else:
            exchanged.result.copy_(rows)


def test_attention_far_out_is_that_at_the_beginning():
    """Segments of two shards begin again with every other rank: rank 1 and the last of 2^16."""
    length, pattern = 2**17, DilatedPattern((2**10, 2**18), (2**5, 2**13))
    generator = torch.Generator().manual_seed(1)
    shape = 1, length, 1, 2
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    found = []
    for rank, ranks in ((1, 2), (2**16 - 1, 2**16)):
        tensors = [x.clone().requires_grad_() for x in inputs]
        with lone_rank(rank, ranks):
            sequence = lone_sequence([2])
            with answered(sequence, SameRows()):
                out = sequence_parallel_attention(*tensors, pattern, sequence)
                found.append([out, *torch.autograd.grad(out, tensors, grad)])
    assert all(map(torch.equal, *found))


def test_rotary_angles(monkeypatch):
    """To what float64 holds of such a position, in turns of the true pi; one set for training and
    for the exported model."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CPU)  # as on a machine without one
    first, length = FAR - 3, 3
    model = ModelConfig(kv_channels=64)
    rotary = LongRotaryEmbedding(model, first, one_per_pair=True)
    angles = rotary(length)[:, 0, 0]
    worst = 0.0
    for place, row in enumerate(angles.tolist()):
        for angle, frequency in zip(row, rotary.frequencies.tolist(), strict=True):
            exact = float(Fraction(frequency) * (first + place) % (2 * PI))
            distance = abs(angle - exact)
            worst = max(worst, min(distance, 2 * math.pi - distance))
    # Half a unit of the product, what 2 pi is off in as many turns, half a unit of the float32.
    assert worst < 2**-21 + 2**-21 + 2**-22
    assert angles.dtype == torch.float32
    cos, sin = rotary_angles(LongNetConfig(head_dim=64), [first], length, CPU)
    whole = torch.cat((angles, angles), -1)
    assert torch.equal(cos[0, :, 0], whole.cos()) and torch.equal(sin[0, :, 0], whole.sin())


def config(**flags):
    values = {
        "num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "seq_length": FAR,
        "sequence_parallel_size": 8192, "micro_batch_size": 1, "global_batch_size": 1,
        "data_path": "unread", "tokenizer_type": "ByteTokenizer", **flags,
    }  # fmt: skip
    return config_from_values(values).resolve(8192)


def test_what_has_no_room_is_refused():
    assert config().model.seq_length == FAR
    with pytest.raises(UserError, match="is beyond what xPos can scale"):
        config(position_embedding_type="xpos")
    with pytest.raises(UserError, match="--document-attention isolated has room for 2147483647"):
        config(document_attention="isolated")


class Long:
    """Documents of 2^33 tokens and a few, each token made of its place in the file."""

    prefix, max_token_id, vocab_size, prepend_bos, made_with = "long", None, None, None, {}
    masks_loss = False

    def __init__(self, *lengths: int):
        self.lengths = np.array(lengths, np.int64)
        self.num_documents = len(lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        first = int(self.lengths[:document].sum())
        stop = int(self.lengths[document]) if stop is None else stop
        return self.tokens(first + start, first + stop)

    @staticmethod
    def tokens(begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end, dtype=np.int64) % 9_973

    def place(self, document: int) -> str:
        return f"document {document}"


def test_the_stream_and_its_batches():
    lengths = FAR - 5, 9, FAR, 2**32 + 1
    stream = TokenStream(Long(*lengths), range(4), FAR, shuffle=False)
    ranks, width = 8192, FAR // 8192
    assert np.array_equal(stream.sample(1, FAR - 7, FAR + 1), Long.tokens(2 * FAR - 7, 2 * FAR + 1))
    for rank in (0, ranks - 1):
        start, stop = rank * width, (rank + 1) * width
        batches = training_batches(
            stream, consumed_samples=1, global_batch_size=1, micro_batch_size=1,
            data_parallel_rank=0, data_parallel_size=1, sequence_range=(start, stop),
        )  # fmt: skip
        batch = next(batches)
        assert batch["positions"][[0, -1]].tolist() == [start, stop - 1]
        for name, ahead in (("tokens", 0), ("labels", 1)):
            expected = Long.tokens(FAR + start + ahead, FAR + stop + ahead)
            assert np.array_equal(batch[name][0].numpy(), expected)
    # The first document ends five places before the sample does, the second in the next one.
    starts, stops = stream.document_bounds(0, FAR - 7, FAR)
    assert starts.tolist() == [0] * 2 + [FAR - 5] * 5
    assert stops.tolist() == [FAR - 5] * 2 + [FAR] * 5


def test_samples_that_begin_with_documents():
    stream = TokenStream(Long(2 * FAR + 5, FAR - 5, 7), range(3), FAR, shuffle=False)
    samples = DocumentSamples(stream)
    last = samples.sample(1, FAR - 3, FAR + 1)
    assert np.array_equal(last, Long.tokens(2 * FAR - 3, 2 * FAR + 1))
    rests = samples.sample(2, 0, 7), samples.sample(2, FAR - 3, FAR)
    assert np.array_equal(rests[0], Long.tokens(2 * FAR, 2 * FAR + 7))
    assert np.array_equal(rests[1], Long.tokens(3 * FAR - 3, 3 * FAR))
    starts, stops = samples.document_bounds(2, 3, 7)
    assert starts.tolist() == [0, 0, 5, 5] and stops.tolist() == [5, 5, FAR, FAR]
    assert samples.document_bounds(0, FAR - 1, FAR)[1].tolist() == [FAR]


def test_losses_by_position():
    edges = position_edges(FAR)
    assert edges[-2:] == [3 * 2**31, FAR] and sorted(set(edges)) == edges
    losses = PositionLosses(edges)
    positions = torch.tensor([0, 2**31 - 1, 2**31, 3 * 2**31 - 1, 3 * 2**31, FAR - 1])
    losses.add(positions, torch.arange(1.0, 7.0)[None])
    counted = {edges[i]: losses.sums[i].item() for i in losses.counts.nonzero().flatten().tolist()}
    assert counted == {0: 1, 3 * 2**29: 2, 2**31: 3, 2**32: 4, 3 * 2**31: 5 + 6}
    assert losses.tokens == 6
