"""Which tokens count in the loss, PREFIX.loss: the labels of batches are those of the same data
without a mask, but for tokens that do not count."""

import json
import os
import random
import shutil
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megalong.data.batches import IGNORE_INDEX, DocumentRules, evaluation_batches, training_batches
from megalong.data.blend import Blend, History, Source
from megalong.data.document_samples import DocumentSamples
from megalong.data.indexed import IndexedDocuments
from megalong.data.loss_mask import description, may_mask_loss
from megalong.data.preprocessing import merging
from megalong.data.preprocessing import preprocess as module
from megalong.data.preprocessing.inputs import partition
from megalong.data.preprocessing.merging import merge
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.sources import LengthUpsampling
from megalong.data.stream import TokenStream, split_documents
from megalong.data.text.documents import Reading
from megalong.data.text.files import find_files
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

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
    documents = IndexedDocuments(prefix)
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
        documents = IndexedDocuments(prefix)
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
    sharded, single = IndexedDocuments(str(folder)), IndexedDocuments(str(tmp_path / "1"))
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
        IndexedDocuments(both[1])
    with pytest.raises(UserError, match=message):
        IndexedDocuments(str(tmp_path))


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
    assert not Path(f"{masked}.loss").exists() and not IndexedDocuments(masked).masks_loss
    shutil.copy(f"{plain}.bin", f"{plain}_other.loss")
    with pytest.raises(UserError, match=r"_other\.loss is there already"):
        DocumentWriter(f"{plain}_other", np.uint16)


SUFFIXES = (".bin", ".idx", ".json", ".loss")


def task(model: str | None = None, prompt_key: str | None = "question", **options):
    kind = "ByteTokenizer" if model is None else "SentencePieceTokenizer"
    reading = Reading(prompt_key=prompt_key)
    return module.TokenizingTask(kind, model, reading, **{"append_eod": True} | options)


def preprocess(files, prefix, what, **options) -> str:
    bar = progress_bar(1, "B", "", enabled=False)
    module.preprocess(files, str(prefix), what, progress=bar, **options)
    return f"{prefix}_text_document"


def merged(prefixes, prefix, **options) -> dict:
    return merge(prefixes, str(prefix), progress=progress_bar(1, "B", "", enabled=False), **options)


def content(prefix) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in SUFFIXES]


@pytest.fixture(scope="module")
def records() -> list[dict[str, str]]:
    """Words, many of which come again, also as the same words cut at another place."""
    draw = random.Random(5)
    words = ["dilated", "attention", "says", "it", "\u00e9t\u00e9", "of", "a", "\u3042", "1234"]
    found = []
    for i in range(400):
        text = [draw.choice(words) + " " for _ in range(draw.randrange(2, 9))]
        cut = draw.randrange(len(text))
        found.append({"question": "".join(text[:cut]), "text": "".join(text[cut:])})
        if i % 9 == 0:
            found.append(dict(found[draw.randrange(len(found))]))
        if i % 9 == 1:
            found.append({"question": "", "text": "".join(text)})
    return found


@pytest.fixture
def inputs(tmp_path, records) -> list[str]:
    """Several files of JSON lines, with lines that cannot be used."""
    (tmp_path / "in").mkdir()
    for i in range(5):
        lines = [json.dumps(record) for record in records[i::5]]
        lines[3:3] = ['{"text": "no question"}', '{"question": "no text"}', "{", ""]
        lines.append('{"question": "an empty text", "text": ""}')
        (tmp_path / "in" / f"{i}.jsonl").write_text("\n".join(lines))
    return find_files([str(tmp_path / "in")])


def ordered(records) -> list[dict[str, str]]:
    return [record for i in range(5) for record in records[i::5]]


def test_tokens_and_masks_by_hand(tmp_path, inputs, records, tokenizer_model):
    prefix = preprocess(inputs, tmp_path / "out", task(tokenizer_model))
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model)
    tokens, mask, lengths = [], [], []
    for record in ordered(records):
        prompt, text = (tokenizer.encode(record[key]) for key in ("question", "text"))
        tokens += [*prompt, *text, tokenizer.eod]
        mask += [0] * len(prompt) + [1] * (len(text) + 1)
        lengths.append(len(prompt) + len(text) + 1)
    assert np.fromfile(f"{prefix}.bin", np.uint16).tolist() == tokens
    assert np.fromfile(f"{prefix}.loss", np.uint8).tolist() == mask
    made = json.loads(Path(f"{prefix}.json").read_text())
    assert made["prompt_key"] == "question" and made["loss_mask"]["tokens"] == sum(mask)
    assert made["left_out"] == {"broken": 15, "empty": 5, "short": 0, "repeated": 0}
    reasons = [problem["reason"] for problem in made["skipped"][:3]]
    assert reasons[:2] == ["no key 'question'", "no key 'text'"]
    assert made["bytes"] == sum(len("".join(record.values()).encode()) for record in records)
    pairs = {(record["question"], record["text"]) for record in records}
    assert made["repeats"]["documents"] == len(records) - len(pairs)
    assert len(pairs) > len({question + text for question, text in pairs})


def test_what_is_left_out_leaves_the_mask_as_it_is(tmp_path, inputs, records):
    prefix = preprocess(inputs, tmp_path / "out", task(deduplicate=True, min_tokens=12))
    kept = []
    for record in ordered(records):
        parts = [record[key].encode() for key in ("question", "text")]
        if parts not in kept and sum(map(len, parts)) + 1 >= 12:
            kept.append(parts)
    masks = (b"\0" * len(prompt) + b"\1" * (len(text) + 1) for prompt, text in kept)
    assert Path(f"{prefix}.loss").read_bytes() == b"".join(masks)


def test_any_way_of_writing_it_is_the_same(tmp_path, inputs, tokenizer_model, monkeypatch):
    """With workers, in partitions that are merged, killed and gone on with, and by gigatoken."""
    what = task(tokenizer_model, deduplicate=True)
    expected = content(preprocess(inputs, tmp_path / "whole", what))
    assert content(preprocess(inputs, tmp_path / "two", what, workers=2)) == expected
    parts = []
    for number in (1, 2, 3):
        files, share = partition(inputs, f"{number}/3", lambda line: None)
        parts.append(preprocess(files, tmp_path / str(number), what, partition=share))
    with monkeypatch.context() as patch:
        patch.setattr(merging, "_CHUNK_DOCUMENTS", 7)
        merged(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == expected

    class Killed(BaseException):
        pass

    replace, calls = os.replace, []

    def dies(*paths):
        calls.append(paths)
        if len(calls) in (4, 20):
            raise Killed
        replace(*paths)

    monkeypatch.setattr(module, "BATCH_BYTES", 2000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        for _ in range(2):
            with pytest.raises(Killed):
                preprocess(inputs, tmp_path / "killed", what, part_bytes=1000)
        preprocess(inputs, tmp_path / "killed", what, part_bytes=1000)
    assert content(tmp_path / "killed_text_document") == expected
    pytest.importorskip("gigatoken")
    fast = task(tokenizer_model, deduplicate=True, backend="fast")
    assert content(preprocess(inputs, tmp_path / "fast", fast)) == expected


def test_columns_of_parquet(tmp_path, records):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "b.parquet")
    lines, rows = (
        preprocess([str(tmp_path / f"a.{kind}")], tmp_path / kind, task())
        for kind in ("jsonl", "parquet")
    )
    for suffix in (".bin", ".idx", ".loss"):
        assert Path(lines + suffix).read_bytes() == Path(rows + suffix).read_bytes()
    with pytest.raises(UserError, match="no document with text"):
        preprocess([str(tmp_path / "b.parquet")], tmp_path / "none", task())


def test_merged_with_data_without_a_mask(tmp_path, inputs):
    masked = preprocess(inputs, tmp_path / "masked", task())
    plain = preprocess(inputs, tmp_path / "plain", task(prompt_key=None))
    assert not Path(f"{plain}.loss").exists()
    made = merged([plain, masked], tmp_path / "both")
    count = os.path.getsize(f"{plain}.bin") // 2
    mask = Path(f"{tmp_path}/both.loss").read_bytes()
    assert mask == b"\1" * count + Path(f"{masked}.loss").read_bytes()
    assert made["loss_mask"]["tokens"] == sum(mask) and made["prompt_key"] is None
    merged([plain], tmp_path / "both", overwrite=True)
    assert not (tmp_path / "both.loss").exists()
    Path(f"{masked}.loss").write_bytes(b"\1")
    with pytest.raises(UserError, match=r"masked_text_document\.loss: 1 bytes, but one for each"):
        merged([plain, masked], tmp_path / "other")


def test_what_else_is_wrong_is_told(tmp_path, inputs, run_tool):
    flags = ("--input", *inputs, "--output-prefix", tmp_path / "x", "--prompt-key", "text")
    flags = (*flags, "--tokenizer-type", "ByteTokenizer")
    for more, message in (
        ((), "--prompt-key text: is one of --json-keys: name another"),
        (
            ("--json-keys", "answer", "--documents", "file"),
            "--prompt-key text is of JSON lines and Parquet, and --documents file reads neither",
        ),
    ):
        done = run_tool("tools/preprocess_data.py", *flags, *more)
        assert done.returncode == 2 and message in done.stderr
