"""A run of tools/preprocess_data.py that was killed goes on, and what it writes is the same."""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
from pathlib import Path

import pytest

from megalong.data import formats
from megalong.data.preprocessing import preprocess as module
from megalong.data.preprocessing import unfinished
from megalong.data.text.documents import Reading
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar

TASK = module.TokenizingTask("ByteTokenizer", None, Reading(), append_eod=True)
SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    """Three files of JSON lines, with broken lines and texts that come again, and one of text."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(3):
        records = [{"text": f"{line % 40} {i}" * (line % 7)} for line in range(100)]
        lines = [json.dumps(record) for record in records]
        lines[30] = "broken"
        (folder / f"{i}.jsonl").write_text("\n".join(lines))
    (folder / "plain.txt").write_text("text")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 200)


def preprocess(files, prefix, task=TASK, **options):
    bar = progress_bar(1, "B", "", enabled=False)
    options = {"part_bytes": 500} | options
    return module.preprocess(files, str(prefix), task, progress=bar, **options)


def content(prefix) -> list[bytes]:
    return [Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in SUFFIXES]


class Killed(BaseException):
    """In the place of a SIGKILL: nothing below catches it."""


def kill_at(monkeypatch, call: int, name: str = "fsync"):
    """The process dies in this call of a function of `os`."""
    function, calls = getattr(os, name), []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return function(*arguments)

    monkeypatch.setattr(os, name, dies)
    return lambda: monkeypatch.setattr(os, name, function)


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_run_killed_anywhere_goes_on(tmp_path, inputs, monkeypatch, name):
    """At every time that something is made durable or given its name, until none is left."""
    preprocess(inputs, tmp_path / "whole")
    resumed, call = [], 1
    monkeypatch.setattr(unfinished.Unfinished, "_remove", lambda self: None)  # a kill removes none
    while True:
        restore = kill_at(monkeypatch, call, name)
        prefix = tmp_path / f"killed{call}"
        try:
            preprocess(inputs, prefix)
            break
        except Killed:
            restore()
        resumed.append(preprocess(inputs, prefix).resumed)
        assert content(prefix) == content(tmp_path / "whole")
        shutil.rmtree(f"{prefix}.unfinished", ignore_errors=True)
        call += 17 if name == "fsync" else 3
    assert len(resumed) > 3 and resumed == sorted(resumed) and resumed[-1] > 200


def part_of(inputs, prefix, monkeypatch, call: int = 8, **options) -> Path:
    """A run killed after some parts; gives its folder."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, call, "replace")
        preprocess(inputs, prefix, **options)
    folder = Path(f"{prefix}.unfinished")
    assert json.loads((folder / "state.json").read_text())["content"]["progress"]
    return folder


def test_what_has_changed_is_refused_or_begun_anew(tmp_path, inputs, monkeypatch):
    prefix, whole = tmp_path / "out", tmp_path / "whole"
    folder = part_of(inputs, prefix, monkeypatch)
    with pytest.raises(UserError, match=r"out_text_document\.bin is there already"):
        Path(f"{prefix}_text_document.bin").touch()
        preprocess(inputs, prefix)
    Path(f"{prefix}_text_document.bin").unlink()
    other = module.TokenizingTask("ByteTokenizer", None, Reading(), append_eod=False)
    cases = [
        (inputs, other, "begun with --append-eod on, and now it is off: give the same"),
        (inputs[:2], TASK, "begun with --input 4 files, "),
    ]
    for files, task, said in cases:
        with pytest.raises(UserError, match=said):
            preprocess(files, prefix, task)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="begun with megalong"):
        patch.setattr(module, "__version__", "0")
        preprocess(inputs, prefix)
    assert folder.exists()

    with open(inputs[0], "a") as file:
        file.write('\n{"text": "more"}\n')
    with pytest.raises(UserError, match=f"{inputs[0]} has changed since it was read"):
        preprocess(inputs, prefix)
    assert preprocess(inputs, prefix, overwrite=True).resumed == 0
    preprocess(inputs, whole)
    assert content(prefix) == content(whole) and not folder.exists()


@pytest.mark.parametrize("damage", ["state", "number", "bin"])
def test_damaged_notes_are_refused_or_begun_anew(tmp_path, inputs, monkeypatch, damage):
    folder = part_of(inputs, tmp_path / "out", monkeypatch)
    state = folder / "state.json"
    if damage == "state":
        state.write_bytes(state.read_bytes()[:100])
    elif damage == "number":
        state.write_text(state.read_text().replace('"tokens": ', '"tokens": 1', 1))
    else:
        os.truncate(folder / "out_text_document.bin", 10)
    with pytest.raises(UserError, match=r"damaged.*--overwrite begins anew"):
        preprocess(inputs, tmp_path / "out")
    preprocess(inputs, tmp_path / "out", overwrite=True)
    preprocess(inputs, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_full_disk_is_named_and_the_run_goes_on(tmp_path, inputs, monkeypatch):
    """A limit on the size of files answers writes as a disk does that is full: with a part."""
    prefix = tmp_path / "out"
    preprocess(inputs, tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = Path(f"{tmp_path / 'whole'}_text_document.bin").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 + 3, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            preprocess(inputs, prefix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for words in ("out_text_document.bin: File too large (", " free there)", "needs about"):
        assert words in str(error.value)
    assert "goes on from there" in str(error.value)
    assert {path.name for path in tmp_path.glob("out*")} == {"out.unfinished"}
    assert preprocess(inputs, prefix).resumed > 50
    assert content(prefix) == content(tmp_path / "whole")


def test_a_disk_full_before_anything_is_finished_leaves_nothing(tmp_path, inputs, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*nothing was written"):
            preprocess(inputs, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def give(tmp_path, monkeypatch):
    """Makes bytes the standard input."""
    with contextlib.ExitStack() as stack:

        def give(content: bytes) -> None:
            path = tmp_path / "stream"
            path.write_bytes(content)
            monkeypatch.setattr("sys.stdin", stack.enter_context(path.open()))

        yield give


@pytest.mark.parametrize("overwrite", [False, True])
def test_standard_input_goes_on_where_it_begins_with_the_same(
    tmp_path, inputs, monkeypatch, give, overwrite
):
    lines = Path(inputs[0]).read_bytes()
    give(lines)
    part_of(["-"], tmp_path / "out", monkeypatch, call=3)
    give(b" " + lines)
    with pytest.raises(UserError, match=r"does not begin with .*: remove .*unfinished to begin"):
        preprocess(["-"], tmp_path / "out", overwrite=overwrite)
    for fewer in [b"", lines[: lines.index(b"\n") + 1]]:
        give(fewer)
        with pytest.raises(UserError, match=r"input: it gives [01] document.* had been"):
            preprocess(["-"], tmp_path / "out")
    give(lines + b"\n{}")
    assert preprocess(["-"], tmp_path / "out", overwrite=overwrite).resumed > 10
    sidecar = json.loads(Path(f"{tmp_path}/out_text_document.json").read_text())
    assert sidecar["inputs"][0]["sha256"] == hashlib.sha256(lines + b"\n{}").hexdigest()
    preprocess(inputs[:1], tmp_path / "whole")
    assert content(tmp_path / "out")[:2] == content(tmp_path / "whole")[:2]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("then", [[], ["plain.txt"]], ids=["alone", "and a file"])
def test_standard_input_that_was_read_to_its_end_has_to_give_the_same(
    tmp_path, inputs, monkeypatch, give, then, overwrite, capsys
):
    """Also where the run had noted all, so that nothing is left to be read."""
    lines, files = Path(inputs[0]).read_bytes(), ["-", *(f"{tmp_path}/in/{name}" for name in then)]
    give(gzip.compress(lines))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(unfinished.Unfinished, "give_names", lambda self: kill())
        preprocess(files, tmp_path / "out")
    for other in [b"", lines + b'\n{"text": "new"}']:
        give(other)
        with pytest.raises(UserError, match="standard input gives something else than when it was"):
            preprocess(files, tmp_path / "out", overwrite=overwrite)
    give(lines)  # as it is unpacked
    capsys.readouterr()
    assert preprocess(files, tmp_path / "out", overwrite=overwrite).resumed > 50
    assert capsys.readouterr().err == "standard input: read to see that it gives the same again\n"
    give(lines)
    preprocess(files, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_overwrite_begins_anew_before_a_stream_is_read(tmp_path, inputs, monkeypatch, give):
    """Where a file behind it has changed."""
    lines, files = Path(inputs[0]).read_bytes(), ["-", *inputs[1:]]
    give(lines)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(unfinished.Unfinished, "give_names", lambda self: kill())
        preprocess(files, tmp_path / "out")
    Path(inputs[-1]).write_text("other text")
    give(lines)
    assert preprocess(files, tmp_path / "out", overwrite=True).resumed == 0
    preprocess(inputs, tmp_path / "whole")
    assert content(tmp_path / "out")[:2] == content(tmp_path / "whole")[:2]


def kill():
    raise Killed


def test_a_damage_behind_the_last_document_read_is_noted_once(tmp_path, inputs, monkeypatch):
    """Wherever the run was killed, also right behind it."""
    text = random.Random(0).randbytes(5000).hex()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ["x", "y", text])
    damaged = tmp_path / "in" / "00.jsonl.gz"
    damaged.write_bytes(gzip.compress(lines.encode())[:4000])
    files = [str(damaged), *inputs[:1]]
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 1)
    whole = preprocess(files, tmp_path / "whole")
    assert (whole.cut_short, whole.skipped) == (1, 2)
    for call in range(2, 7):
        prefix = tmp_path / str(call)
        part_of(files, prefix, monkeypatch, call, part_bytes=0)
        assert preprocess(files, prefix).skipped == 2
        assert content(prefix) == content(tmp_path / "whole")


def test_a_file_that_can_no_longer_be_read_as_far_is_refused(tmp_path, inputs, monkeypatch):
    prefix = tmp_path / "out"
    part_of(inputs[:1], prefix, monkeypatch, call=3)

    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"unreadable.*had been"):
        patch.setattr(formats, "open_file", fails)
        preprocess(inputs[:1], prefix)
    assert preprocess(inputs[:1], prefix).resumed > 10
    preprocess(inputs[:1], tmp_path / "whole")
    assert content(prefix) == content(tmp_path / "whole")


def test_the_description_says_what_the_data_is_made_of(tmp_path, inputs):
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "a.py").write_text("a")
    preprocess(inputs, tmp_path / "out")
    sidecar = json.loads(Path(f"{tmp_path}/out_text_document.json").read_text())
    for listed, path in zip(sidecar["inputs"], inputs, strict=True):
        data = Path(path).read_bytes()
        assert (listed["path"], listed["size"]) == (path, len(data))
        assert listed["sha256"] == hashlib.sha256(data).hexdigest()
    skipped = [(problem["file"], problem["line"]) for problem in sidecar["skipped"]]
    assert skipped == [(path, 31) for path in inputs[:3]]
    assert all(problem["reason"].startswith("not valid JSON") for problem in sidecar["skipped"])
    texts = [json.loads(line)["text"] for path in inputs[:3] for line in good_lines(path)]
    texts = [text for text in [*texts, "text"] if text]
    assert sidecar["documents"] == len(texts)
    again = [text for i, text in enumerate(texts) if text in texts[:i]]
    tokens = sum(len(text) + 1 for text in again)
    assert sidecar["repeats"] == {"documents": len(again), "tokens": tokens}
    buckets = {}
    for text in texts:
        least = str(1 << (len(text) + 1).bit_length() - 1)
        buckets[least] = buckets.get(least, 0) + 1
    assert sidecar["length_histogram"] == buckets

    task = dataclasses.replace(TASK, deduplicate=True, min_tokens=10)
    summary = preprocess(inputs, tmp_path / "fewer", task).keys["text"]
    kept = {text: None for text in texts if len(text) + 1 >= 10}
    assert summary.documents == len(kept) and summary.bytes == sum(map(len, kept))
    assert summary.short == sum(len(text) + 1 < 10 for text in texts)
    assert summary.documents + summary.repeats + summary.short == len(texts)


def good_lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text().splitlines() if line.startswith("{")]


def test_a_folder_has_one_hash(tmp_path):
    folder = tmp_path / "repository"
    (folder / "b").mkdir(parents=True)
    (folder / "a.py").write_text("1")
    (folder / "b" / "c.py").write_text("2")
    reading = Reading(documents="repository")
    preprocess([str(folder)], tmp_path / "out", dataclasses.replace(TASK, reading=reading))
    sidecar = json.loads(Path(f"{tmp_path}/out_text_document.json").read_text())
    sums = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
        for text, name in [("1", "a.py"), ("2", "b/c.py")]
    )
    assert sidecar["inputs"][0]["sha256"] == hashlib.sha256(sums.encode()).hexdigest()
