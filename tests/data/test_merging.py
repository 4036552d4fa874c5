"""tools/merge_datasets.py, and partitions of the input: together they write what one run writes."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from megalong.data.preprocessing import merging, writer
from megalong.data.preprocessing import preprocess as module
from megalong.data.preprocessing.inputs import partition as partition_of
from megalong.data.preprocessing.merging import find_prefixes, merge
from megalong.data.preprocessing.writer import LISTED, SeenTexts, text_hashes
from megalong.data.text.documents import Reading
from megalong.data.text.files import find_files
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

SUFFIXES = (".bin", ".idx", ".json")


def partition(files, share, say=lambda line: None):
    return partition_of(files, share, say)


def task(**options):
    options = {"append_eod": True} | options
    return module.TokenizingTask("ByteTokenizer", None, Reading(), **options)


def preprocess(files, prefix, what=None, **options) -> str:
    bar = progress_bar(1, "B", "", enabled=False)
    module.preprocess(files, str(prefix), what or task(), progress=bar, **options)
    return f"{prefix}_text_document"


def merged(prefixes, prefix, **options) -> dict:
    bar = progress_bar(1, "B", "", enabled=False)
    return merge(list(map(str, prefixes)), str(prefix), progress=bar, **options)


def content(prefix) -> list:
    """What is in the files."""
    files = [Path(f"{prefix}{suffix}") for suffix in (*SUFFIXES, ".skipped.jsonl", ".inputs.jsonl")]
    return [path.exists() and path.read_bytes() for path in files]


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    """Files of very different sizes, with texts that come again in others, and broken lines."""
    draw = random.Random(1)
    (tmp_path / "in").mkdir()
    for i in range(LISTED + 30):
        records = [{"text": str(draw.randrange(300)) * 3} for _ in range(draw.choice([0, 1, 20]))]
        lines = [*map(json.dumps, records), "broken", '{"text": ""}']
        (tmp_path / "in" / f"{i:03}.jsonl").write_text("\n".join(lines))
    return find_files([str(tmp_path / "in")])


@pytest.mark.parametrize("what", [{}, {"deduplicate": True, "min_tokens": 8}], ids=str)
def test_merged_partitions_are_what_one_run_writes(tmp_path, inputs, what, monkeypatch):
    """Also where repeats are counted in several passes."""
    whole = preprocess(inputs, tmp_path / "whole", task(**what))
    parts = []
    for number in range(1, 6):
        files, share = partition(inputs, f"{number}/5")
        options = {"partition": share, "part_bytes": 300}
        parts.append(preprocess(files, tmp_path / str(number), task(**what), **options))
    monkeypatch.setattr(writer, "TEXTS_AT_ONCE", 50)
    made = merged(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(whole)
    assert made["left_out"]["broken"] == len(inputs) and made["inputs_in_all"] == len(inputs)
    assert made["repeats"]["documents"] > 0
    assert made["left_out"]["repeated"] == (made["repeats"]["documents"] if what else 0)
    assert not list(tmp_path.glob("merged*.hashes")) and not list(tmp_path.glob("*.unfinished"))


def test_partitions_are_all_files_in_order_and_alike_in_size(tmp_path):
    draw = random.Random(0)
    files = []
    for i in range(50):
        files.append(str(tmp_path / f"{i:02}"))
        Path(files[-1]).write_bytes(b"x" * draw.randrange(100))
    sizes = dict(zip(files, map(os.path.getsize, files), strict=True))
    for count in (1, 2, 7, 60):
        said = []
        parts = [partition(files, f"{k}/{count}", said.append)[0] for k in range(1, count + 1)]
        assert len(said) == (count if count < 60 else 2 * count)
        assert [file for part in parts for file in part] == files
        shares = [sum(sizes[file] for file in part) for part in parts]
        assert max(shares) <= sum(sizes.values()) / count + 100
    said = []
    partition(files, "1/60", said.append)
    assert said[0].startswith("--partition 1/60: 1 of 50 input files, 49 B")
    assert "files are not cut, and so the shares are uneven: 49 B, " in said[1]
    assert " and 44 more, the largest " in said[1] and "take fewer shares" in said[1]
    for bad in ("5/3", "0/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UserError, match=f"--partition {bad}: k/n is expected, with k from 1"):
            partition(files, bad)


def test_the_tool_says_what_it_merged(tmp_path, run_tool):
    (tmp_path / "a.txt").write_text("one")
    parts = [preprocess([str(tmp_path / "a.txt")], tmp_path / name) for name in "ab"]
    arguments = ("--input", tmp_path / "?_text_document", "--output-prefix", tmp_path / "out")
    done = run_tool("tools/merge_datasets.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/out: 2 documents, 8 tokens, of 2 datasets\n"
    one, two = (np.fromfile(f"{prefix}.bin", np.uint16) for prefix in (parts[0], tmp_path / "out"))
    assert two.tolist() == [*one, *one]
    done = run_tool("tools/merge_datasets.py", *arguments)
    assert done.returncode == 2 and "out.bin is there already" in done.stderr


def test_an_empty_partition_is_written_so_that_none_is_missing(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    files = find_files([str(tmp_path / "*.txt")])
    parts = [partition(files, f"{k}/3") for k in (1, 2, 3)]
    assert [len(files) for files, _ in parts] == [1, 0, 1]
    prefixes = [
        preprocess(files, tmp_path / str(share.number), partition=share) for files, share in parts
    ]
    assert merged(prefixes, tmp_path / "all")["documents"] == 2
    with pytest.raises(UserError, match="1 partition of 3 missing: 2/3"):
        merged([prefixes[0], prefixes[2]], tmp_path / "x")
    with pytest.raises(UserError, match="is there already"):
        merged(prefixes, tmp_path / "all")


def test_partitions_of_different_inputs_are_named(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    files = find_files([str(tmp_path / "*.txt")])
    first = preprocess(files[:1], tmp_path / "1", partition=partition(files, "1/2")[1])
    (tmp_path / "c.txt").write_text("c")
    files = find_files([str(tmp_path / "*.txt")])
    second = preprocess(files[:1], tmp_path / "2", partition=partition(files, "2/2")[1])
    with pytest.raises(UserError) as error:
        merged([first, second], tmp_path / "out")
    assert str(error.value) == (
        f"--input {second}: --partition 2/2 of 3 files, 3 bytes, but {first} is --partition 1/2 of"
        " 2 files, 2 bytes with other names or sizes: make them of the same files"
    )


def test_a_merge_goes_on_where_it_was_killed(tmp_path, inputs, monkeypatch):
    whole = preprocess(inputs, tmp_path / "whole")
    parts = []
    for number in (1, 2, 3):
        files, share = partition(inputs, f"{number}/3")
        parts.append(preprocess(files, tmp_path / str(number), partition=share))
    monkeypatch.setattr(merging, "_CHUNK_DOCUMENTS", 7)
    monkeypatch.setattr(merging, "PART_BYTES", 100)
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def dies(*paths):
        calls.append(paths)
        if len(calls) in (9, 30, 60):
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", dies)
    for _ in range(3):
        with pytest.raises(Killed):
            merged(parts, tmp_path / "merged")
    merged(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(whole)


def test_what_does_not_belong_together_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    files = [str(tmp_path / "a.txt")]
    first = preprocess(files, tmp_path / "first")
    other = preprocess(files, tmp_path / "other", task(append_eod=False))
    with pytest.raises(UserError, match=r"made with append_eod False, and .* True"):
        merged([first, other], tmp_path / "out")
    sidecar = Path(f"{other}.json")
    description = json.loads(sidecar.read_text()) | {"append_eod": True, "tokenizer_sha256": "x"}
    sidecar.write_text(json.dumps(description))
    with pytest.raises(UserError, match="made with tokenizer_sha256 x, and"):
        merged([first, other], tmp_path / "out")
    sidecar.unlink()
    with pytest.raises(UserError, match=r"no file .*other_text_document\.json"):
        merged([first, other], tmp_path / "out")
    with pytest.raises(UserError, match=r"no file .*nothing"):
        find_prefixes([str(tmp_path / "nothing")])
    with pytest.raises(UserError, match="named twice"):
        find_prefixes([first, str(tmp_path / "f*")])
    same = tmp_path / ".." / tmp_path.name / "first_text_document"
    with pytest.raises(UserError, match="is one of the inputs: choose another name"):
        merge([first], str(same), overwrite=True, progress=None)
    assert not list(tmp_path.glob("out*"))


def test_outputs_without_hashes_are_merged_with_repeats_unknown(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    files = [str(tmp_path / "a.txt")]
    parts = [preprocess(files, tmp_path / name, task(deduplicate=True)) for name in "ab"]
    made = merged(parts, tmp_path / "out")
    assert made["documents"] == 2 and made["bytes"] == 6 and made["tokens"] == 8
    assert made["repeats"] is None and made["deduplicate"] is False
    assert made["length_histogram"] == {"4": 2}


def test_seen_texts_are_a_set():
    draw = random.Random(2)
    seen, known = SeenTexts(), set()
    for _ in range(40):
        texts = [str(draw.randrange(20_000)).encode() for _ in range(draw.choice([0, 1, 900]))]
        expected = []
        for text in texts:
            expected.append(text not in known)
            known.add(text)
        assert seen.add(text_hashes(texts)).tolist() == expected
    assert seen._count == len(known)
    # Hashes that begin alike meet in the same places of the table.
    alike = np.stack([np.full(500, 7, np.uint64), np.arange(500, dtype=np.uint64)], axis=1)
    assert SeenTexts().add(np.concatenate([alike, alike])).tolist() == [True] * 500 + [False] * 500
