"""Which tokens count in the loss, PREFIX.loss: the labels of batches are those of the same data
without a mask, but for tokens that do not count."""

import json
import shutil
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megalong.data.batches import IGNORE_INDEX, DocumentRules, evaluation_batches, training_batches
from megalong.data.blend import Blend, History, Source
from megalong.data.document_samples import DocumentSamples
from megalong.data.loss_mask import description, may_mask_loss
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.shards import open_documents
from megalong.data.sources import LengthUpsampling
from megalong.data.stream import TokenStream, split_documents
from megalong.utils.errors import UserError

N, EOD = 32, 999


def counts(tokens):
    """By what a token is, so that its label says whether it counts."""
    return tokens % 5 < 2


def write(prefix, documents=60, seed=0, masked=True) -> str:
    """Documents of 1 to 90 tokens, the last one EOD; the same with a mask and without."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 90, documents)
    tokens = draw.integers(0, 900, lengths.sum()).astype(np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOD
    with DocumentWriter(str(prefix), np.uint16, masks_loss=masked) as writer:
        writer.add(tokens, lengths, counts(tokens) if masked else None)
        writer.commit({})
    return str(prefix)


@pytest.fixture
def both(tmp_path) -> tuple[str, str]:
    """The same documents without a mask and with one."""
    return write(tmp_path / "plain", masked=False), write(tmp_path / "masked")


def samples_of(prefix: str, mode: str, weights: str | None = None, salt: int = 0):
    documents = open_documents(prefix)
    stream = TokenStream(
        documents, split_documents(documents.num_documents, "8,2,0")[0], N, seed=3, salt=salt,
        upsampling=None if weights is None else LengthUpsampling.parse([weights]),
    )  # fmt: skip
    return stream if mode == "stream" else DocumentSamples(stream)


def micro_batches(samples, number=60, *, consumed=7, part=None, rank=0, rules=()):
    found = training_batches(
        samples, consumed_samples=consumed, global_batch_size=12, micro_batch_size=2,
        data_parallel_rank=rank, data_parallel_size=2, sequence_range=part,
        documents=DocumentRules(*rules),
    )  # fmt: skip
    return list(islice(found, number))


def without(labels: torch.Tensor) -> torch.Tensor:
    """The labels that are left of those of data without a mask."""
    return torch.where(counts(labels), labels, IGNORE_INDEX)


@pytest.mark.parametrize(
    "mode, weights", [("stream", None), ("document", None), ("stream", "40:2.5")]
)
@pytest.mark.parametrize("part", [None, (8, 24)])
def test_labels_are_of_what_counts(both, mode, weights, part):
    """For three epochs, in either mode, on either rank, and told together with --eod-mask-loss."""
    plain, masked = (samples_of(prefix, mode, weights) for prefix in both)
    assert masked.masks_loss and not plain.masks_loss
    for rank, rules in ((0, ()), (1, (True, EOD))):
        options = {"part": part, "rank": rank, "rules": rules}
        expected, found = (micro_batches(x, **options) for x in (plain, masked))
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one["tokens"], other["tokens"])
            assert torch.equal(without(one["labels"]), other["labels"])
            if rules:
                assert torch.equal(one["document_start"], other["document_start"])
        for step in range(0, len(found), 3):  # how many there are on the rank, each is told
            of_step = found[step : step + 3]
            told = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in of_step)
            assert [batch["predicted"] for batch in of_step] == [told] * 3
    assert micro_batches(masked, 1, consumed=7 + 12)[0]["labels"].tolist() == (
        micro_batches(masked)[3]["labels"].tolist()
    )


@pytest.mark.parametrize("slices, size", [(1, 1), (4, 3)])
def test_evaluation_predicts_what_counts_once(both, slices, size):
    streams = []
    for prefix in both:
        documents = open_documents(prefix)
        part = split_documents(documents.num_documents, "7,3,0")[1]
        streams.append(TokenStream(documents, part, N, shuffle=False))
    predicted = []
    for rank in range(size):
        for k in range(0, N, N // slices):
            options = {
                "micro_batch_size": 2, "data_parallel_rank": rank, "data_parallel_size": size,
                "sequence_range": (k, k + N // slices),
            }  # fmt: skip
            pairs = (evaluation_batches(stream, **options) for stream in streams)
            for one, other in zip(*pairs, strict=True):
                assert torch.equal(one["tokens"], other["tokens"])
                kept = (one["labels"] != IGNORE_INDEX) & counts(one["labels"])
                assert torch.equal(torch.where(kept, one["labels"], IGNORE_INDEX), other["labels"])
                predicted += other["labels"][kept].tolist()
    expected = streams[0].tokens(1, streams[0].tokens_per_epoch)
    assert sorted(predicted) == sorted(expected[counts(expected)].tolist())


def blend(sources: dict[str, str], **options) -> Blend:
    share = Fraction(1, len(sources))

    def opened(prefix: str, salt: int):
        return samples_of(prefix, "stream", salt=salt)

    return Blend([Source(n, share, partial(opened, p)) for n, p in sources.items()], **options)


def test_sources_with_and_without_a_mask(both, tmp_path):
    other = write(tmp_path / "other", seed=1, masked=False)
    plain = blend({"one": both[0], "two": other})
    mixed = blend({"one": both[1], "two": other})
    for one, two in zip(micro_batches(plain), micro_batches(mixed), strict=True):
        assert torch.equal(one["source"], two["source"])
        of_masked = (one["source"] == mixed.sources.index("one"))[:, None]
        assert of_masked.any() and not of_masked.all()
        kept = torch.where(of_masked, without(one["labels"]), one["labels"])
        assert torch.equal(kept, two["labels"])
        assert "predicted" in two and "predicted" not in one


def test_going_on_with_or_without_a_mask_is_told(both):
    plain, masked = ({"one": prefix} for prefix in both)

    def news(then, now):
        kept = json.loads(json.dumps(blend(then).history(20).values()))
        return blend(now).continued(20, History.from_values(kept))[1]

    told = "source one has {}: other tokens are predicted"
    assert news(plain, plain) == news(masked, masked) == []
    assert news(plain, masked) == [told.format("a loss mask now, and had none")]
    assert news(masked, plain) == [told.format("no loss mask now")]
    older = blend(plain).history(20).values()
    del older["masked"]  # a checkpoint of before there were masks
    assert blend(plain).continued(20, History.from_values(older))[1] == []


def test_a_folder_of_pairs_of_which_some_have_one(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(4):
        write(folder / str(number), documents=9, seed=number, masked=number % 2 == 1)
    write(tmp_path / "1", documents=9, seed=1)
    sharded, single = open_documents(str(folder)), open_documents(str(tmp_path / "1"))
    assert sharded.masks_loss and sharded.num_documents == 36
    for i in range(36):
        tokens, mask = sharded.read(i, 0), sharded.loss_mask(i)
        assert mask.dtype == bool
        assert np.array_equal(mask, counts(tokens) if i // 9 % 2 else np.ones(len(tokens), bool))
        half = len(tokens) // 2
        assert np.array_equal(sharded.loss_mask(i, half), mask[half:])
        if i // 9 == 1:
            assert np.array_equal(single.loss_mask(i - 9, half), mask[half:])
    for documents in (sharded, single):
        with pytest.raises(IndexError):
            documents.loss_mask(0, 0, 1000)
    assert may_mask_loss(str(folder)) and may_mask_loss(str(folder / "1"))
    assert may_mask_loss(str(folder / "[01].bin")) and not may_mask_loss(str(folder / "0"))


def test_documents_of_several_sequences_without_a_description(tmp_path):
    """As Megatron writes them; the mask is anybody's."""
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    tokens = np.arange(60)
    builder.add_document(tokens[:25], [10, 15])
    builder.add_document(tokens[25:], [5, 0, 30])
    builder.finalize(str(tmp_path / "theirs.idx"))
    (tmp_path / "theirs.loss").write_bytes(counts(tokens).astype(np.uint8).tobytes())
    documents = open_documents(str(tmp_path / "theirs"))
    for document, start in ((0, 3), (1, 2)):
        read = documents.read(document, start)
        assert np.array_equal(documents.loss_mask(document, start), counts(read))


def test_a_rank_reads_the_mask_of_its_slice_alone(both):
    samples, read = samples_of(both[1], "stream"), []
    documents = samples.documents
    whole = documents.loss_mask
    documents.loss_mask = lambda i, a, b: read.append(b - a) or whole(i, a, b)
    micro_batches(samples, 1, part=(8, 16))
    # Three micro batches of two samples are counted, one is made, one of the next step counted.
    assert sum(read) <= (3 + 1 + 1) * 2 * 9


def damaged(prefix: str, what: str) -> None:
    mask = Path(f"{prefix}.loss")
    if what == "missing":
        mask.unlink()
    elif what == "cut":
        mask.write_bytes(mask.read_bytes()[:-1])
    elif what == "long":
        mask.write_bytes(mask.read_bytes() + b"\1")
    elif what == "nothing":
        described = json.loads(Path(f"{prefix}.json").read_text())
        described["loss_mask"]["tokens"] = 0
        Path(f"{prefix}.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", "masked.loss: no such file, and .*masked.json says that it tells"),
        ("cut", "masked.loss: .* bytes, but one for each of the .* is expected: cut short"),
        ("long", "masked.loss: .* is expected: too long, or the two files are not of one run"),
        ("nothing", "masked.loss: none of the tokens counts in the loss"),
    ],
)
def test_what_is_wrong_names_the_file(both, tmp_path, what, message):
    damaged(both[1], what)
    with pytest.raises(UserError, match=message):
        open_documents(both[1])
    with pytest.raises(UserError, match=message):
        open_documents(str(tmp_path))


def test_the_description_and_the_files(both):
    mask = np.fromfile(f"{both[1]}.loss", np.uint8)
    tokens = np.fromfile(f"{both[1]}.bin", np.uint16)
    assert np.array_equal(mask, counts(tokens))
    made = json.loads(Path(f"{both[1]}.json").read_text())["loss_mask"]
    assert made == description(f"{both[1]}.loss")
    assert made["tokens"] == mask.sum() and made["bytes"] == len(tokens)
    assert "loss_mask" not in json.loads(Path(f"{both[0]}.json").read_text())
    for suffix in (".bin", ".idx"):
        assert Path(both[0] + suffix).read_bytes() == Path(both[1] + suffix).read_bytes()
    mask[7] = 2
    mask.tofile(f"{both[1]}.loss")
    with pytest.raises(UserError, match=r"masked.loss: byte 7 is 2, and 1 .* is expected"):
        description(f"{both[1]}.loss")


def test_what_replaces_an_output_leaves_no_mask_of_it(both):
    """And one that is there alone is not taken for that of a new output."""
    plain, masked = both
    with DocumentWriter(masked, np.uint16, overwrite=True) as writer:
        writer.add(np.arange(3, dtype=np.uint16), [3])
        writer.commit({})
    assert not Path(f"{masked}.loss").exists() and not open_documents(masked).masks_loss
    shutil.copy(f"{plain}.bin", f"{plain}_other.loss")
    with pytest.raises(UserError, match=r"_other\.loss is there already"):
        DocumentWriter(f"{plain}_other", np.uint16)
