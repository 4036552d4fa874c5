"""What a whole run reads, over any documents and in any layout: everything once, in order."""

import time
import tracemalloc
from itertools import chain, islice, pairwise

import numpy as np
import pytest

from megalong.data.batches import training_batches
from megalong.data.indexed import IndexedDocuments
from megalong.data.preprocessing.writer import DTYPES, HEADER, MAGIC, VERSION
from megalong.data.stream import TokenStream


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


@pytest.mark.parametrize("seed", range(3))
def test_a_run_may_stop_anywhere_and_be_of_any_length(seed):
    documents, length = random_documents(seed), 12

    def new() -> TokenStream:
        return TokenStream(documents, range(len(documents.lengths)), length, seed)

    whole = run(new(), steps=12, batch=2)
    for consumed in range(0, 24, 2):
        rest = run(new(), consumed=consumed, steps=12 - consumed // 2, batch=2, ranks=2)
        assert rest == {i: row for i, row in whole.items() if i >= consumed}
    # Planned for half of it, another batch size, then on: over borders of epochs as well.
    assert run(new(), steps=3, batch=4) | run(new(), consumed=12, steps=6, batch=2) == whole


def test_a_billion_tokens_over_a_thousand_ranks(tmp_path):
    """A rank reads its slice, whatever the rest: a file without content stands for the tokens."""
    length, ranks, documents = 2**30, 1024, 5
    sizes = np.full(documents, length // 4, np.int32)
    prefix = str(tmp_path / "long")
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * int(sizes.sum(dtype=np.int64)))
    with open(f"{prefix}.idx", "wb") as file:
        code = next(code for code, dtype in DTYPES.items() if dtype == np.uint16)
        file.write(HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
        file.write(sizes.data)
        ends = np.cumsum(sizes, dtype=np.int64)
        file.write((2 * (ends - sizes)).data)
        file.write(np.arange(documents + 1, dtype=np.int64).data)
    width = length // ranks
    IndexedDocuments(prefix)  # imports Megatron-core, which is no part of the time
    tracemalloc.start()
    begin = time.perf_counter()
    stream = TokenStream(IndexedDocuments(prefix), range(documents), length, vocab_size=100)
    batch = next(
        training_batches(
            stream,
            consumed_samples=0,
            global_batch_size=1,
            micro_batch_size=1,
            data_parallel_rank=0,
            data_parallel_size=1,
            sequence_range=(517 * width, 518 * width),
        )
    )
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch["tokens"].shape == batch["labels"].shape == (1, 2**20)
    assert batch["positions"][0] == 517 * width
    assert seconds < 1 and peak < 200e6
