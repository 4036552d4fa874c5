"""preprocess_data.py --prompt-key: a prompt and its text are one document, and the text counts."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from megalong.data.preprocessing import merging
from megalong.data.preprocessing import preprocess as module
from megalong.data.preprocessing.merging import merge
from megalong.data.preprocessing.preprocess import partition
from megalong.data.text.documents import Reading
from megalong.data.text.files import find_files
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

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
