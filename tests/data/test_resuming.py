"""A run of tools/preprocess_data.py that was killed goes on, and what it writes is the same."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from megalong.data import preprocess as module
from megalong.data import unfinished
from megalong.errors import UserError
from megalong.progress import progress_bar

TASK = module.TokenizingTask("ByteTokenizer", None, ("text",), append_eod=True)
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
        call += 7 if name == "fsync" else 3
    assert len(resumed) > 3 and resumed == sorted(resumed) and resumed[-1] > 200


def part_of(inputs, prefix, monkeypatch) -> Path:
    """A run killed after some parts; gives its folder."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8, "replace")
        preprocess(inputs, prefix)
    folder = Path(f"{prefix}.unfinished")
    assert json.loads((folder / "state.json").read_text())["content"]["progress"]
    return folder


def test_what_has_changed_is_refused_or_begun_anew(tmp_path, inputs, monkeypatch):
    prefix, whole = tmp_path / "out", tmp_path / "whole"
    folder = part_of(inputs, prefix, monkeypatch)
    other = module.TokenizingTask("ByteTokenizer", None, ("text",), append_eod=False)
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
    for words in (
        "out_text_document.bin: File too large (",
        " free there)",
        "needs about",
        " more",
    ):
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
