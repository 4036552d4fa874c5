"""Finding files and reading documents: kinds of file, broken content, names of places."""

import bz2
import gzip
import json
import lzma
import os
import random
import tarfile
import threading

import pytest

from megalong.data.formats import raw_documents, texts
from megalong.data.text import files
from megalong.data.text.documents import BrokenDocument, Reading
from megalong.data.text.files import find_files, is_stream, total_size
from megalong.utils.errors import UserError


def read(path, keys=("text",), say=lambda line: None):
    """All texts of a file under the first key, broken ones as their message."""
    found, reading = [], Reading(keys)
    for document in raw_documents(str(path), reading, say):
        try:
            values = texts(document, reading)
        except BrokenDocument as error:
            values = {keys[0]: error}
        found += [str(values[key]) for key in keys if key in values]
    return found


def compress(content: bytes, suffix: str) -> bytes:
    ending = suffix.lower().rpartition(".")[2]
    if ending == "zst":
        return (files.zstd or pytest.skip("no zstd")).compress(content)
    by_ending = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    return by_ending.get(ending, bytes)(content)


@pytest.fixture
def give(tmp_path):
    """Writes bytes into a named pipe, some at a time; gives its path."""
    started = []

    def give(content: bytes, pieces: tuple[int, ...] = (1, 2, 4, 3)) -> str:
        path = tmp_path / f"pipe{len(started)}"
        os.mkfifo(path)

        def write() -> None:
            with open(path, "wb", buffering=0) as pipe:
                begin = 0
                for size in pieces:
                    pipe.write(content[begin : begin + size])
                    begin += size
                pipe.write(content[begin:])

        started.append(threading.Thread(target=write))
        started[-1].start()
        return str(path)

    yield give
    for thread in started:
        thread.join(timeout=20)


def test_find_files_keeps_the_order_given_and_sorts_inside_folders(tmp_path):
    for name in ["b/2.txt", "b/1.txt", "b/sub/3.txt", "b/.hidden/4.txt", "b/.5.txt", "a.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "x[1].txt").touch()

    def names(*inputs):
        found = find_files([str(tmp_path / name) for name in inputs])
        return [path.removeprefix(f"{tmp_path}/") for path in found]

    assert names("b", "a.txt") == ["b/1.txt", "b/2.txt", "b/sub/3.txt", "a.txt"]
    assert names("b/*.txt", "b/1.txt") == ["b/1.txt", "b/2.txt"]
    assert names("**/3.txt") == ["b/sub/3.txt"]
    assert names("x[1].txt") == ["x[1].txt"]


def test_find_files_refuses_what_names_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--input .*empty: an empty folder"):
        find_files([str(tmp_path / "empty")])
    for name in ("missing.txt", "*.jsonl"):
        with pytest.raises(UserError, match=r"no such file, folder or match"):
            find_files([str(tmp_path / name)])


def test_a_pattern_matches_neither_pipes_nor_links_to_nothing(tmp_path):
    (tmp_path / "a.txt").touch()
    os.mkfifo(tmp_path / "pipe")
    os.symlink(tmp_path / "missing", tmp_path / "link")
    assert find_files([str(tmp_path / "*")]) == [str(tmp_path / "a.txt")]
    assert find_files([str(tmp_path / "pipe")]) == [str(tmp_path / "pipe")]
    with pytest.raises(UserError, match=r"link: no such file, folder or match"):
        find_files([str(tmp_path / "link")])


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".JSON.GZ", ".jsonl.zst", ".jsonl.xz", ".json.bz2"]
)
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"documents{suffix}"
    rows = ["one", "two\n\twith \u00e9 \U0001f600", ""]
    content = "\n\n".join(json.dumps({"text": row}) for row in rows).encode()
    path.write_bytes(compress(content, suffix))
    assert read(path) == rows
    assert (
        sum(document.size for document in raw_documents(str(path), Reading(), print))
        == path.stat().st_size
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_compression_is_known_by_content(tmp_path, suffix, give):
    lines = b'{"text": "x"}\n{"text": "y"}\n'
    for name in ("a.jsonl", "a", "a.txt.zip"):
        (tmp_path / name).write_bytes(compress(lines, suffix))
        assert read(tmp_path / name) == ["x", "y"]
    (tmp_path / "a.txt").write_bytes(compress(b"text", suffix))
    assert read(tmp_path / "a.txt") == ["text"]
    (tmp_path / "empty").write_bytes(compress(b"", suffix))
    assert read(tmp_path / "empty") == [""]
    for pieces in ((), (1, 2, 4, 3), (12, 1)):
        assert read(give(compress(lines, suffix), pieces)) == ["x", "y"]


def test_zstandard_that_begins_with_a_frame_to_be_skipped(tmp_path, give):
    """As pzstd writes it."""
    data = b"\x5e\x2a\x4d\x18\x04\0\0\0size" + compress(b'{"text": "x"}\n', ".zst")
    (tmp_path / "a").write_bytes(data)
    assert read(tmp_path / "a") == read(give(data)) == ["x"]


def test_standard_input_that_does_not_wait_is_waited_for(monkeypatch):
    """Whoever has opened it may share it with a program that has it so."""
    source, target = os.pipe()
    os.set_blocking(source, False)
    with open(source) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        os.write(target, b'{"text": ')
        writer = threading.Timer(0.2, lambda: (os.write(target, b'"x"}'), os.close(target)))
        writer.start()
        assert read("-") == ["x"]
        writer.join()


def test_a_pipe_is_read_like_standard_input(tmp_path, give):
    lines = b'{"text": "x"}\n{"text": "y"}\n'
    for content in (lines, compress(lines, ".gz")):
        pipe = give(content)
        assert find_files([pipe]) == [pipe] and is_stream(pipe) and total_size([pipe]) is None
        found = list(raw_documents(pipe, Reading(), pytest.fail))
        assert sum(document.size for document in found) == len(content)
    assert read(give(b"")) == []
    [document] = raw_documents(give(compress(b"a\nb", ".xz")), Reading(documents="file"), print)
    assert texts(document, Reading()) == {"text": "a\nb"}
    [document] = raw_documents(give(b"\x1f\x8b\x08"), Reading(documents="file"), print)
    assert "unreadable (Compressed file ended" in document.error
    assert "unreadable from here on (compressed with zip" in read(give(b"PK\x03\x04"))[0]
    # In a folder it is left out: nobody may be writing to it.
    (tmp_path / "a.txt").touch()
    assert find_files([str(tmp_path)]) == [str(tmp_path / "a.txt")]
    with pytest.raises(UserError, match="a stream; --documents repository wants folders"):
        find_files([str(tmp_path / "pipe0")], "repository")


@pytest.mark.parametrize("name", ["a.jsonl.1", "a.bak", "part-00000", "a.txt.gz"])
def test_json_lines_are_known_by_their_content(tmp_path, name):
    path, said = tmp_path / name, []
    content = b'\n{"text": "x", "n": 1}\n{"text": "y"}\n'
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(path, say=said.append) == ["x", "y"]
    assert said == [f"{path}: taken for JSON lines, which it holds, whatever its name"]
    [whole] = read(path, ("body",), said.append)
    assert whole == content.decode() and "for want of a key 'body'" in said[1]


@pytest.mark.parametrize(
    "text", ['{"text": 1, "and":\n 2}', "{% block %}\n{x}\n", '{"text": "x"}\nno object\n', "[1]\n"]
)
def test_what_only_begins_like_json_is_plain_text(tmp_path, text):
    (tmp_path / "a").write_text(text)
    assert read(tmp_path / "a", say=pytest.fail) == [text]


@pytest.mark.parametrize("name", ["a.jsonl.lz4", "a.txt.zip"])
def test_compressed_text_that_is_not_read_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04\x80")
    for given in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=rf"--input .*{name}: .* which is not supported"):
            find_files([str(given)])
    (tmp_path / name).rename(tmp_path / "b.bin")
    assert "compressed with zip, which is not supp" in read(find_files([str(tmp_path)])[0])[0]


@pytest.mark.parametrize("name", ["program.py", "notes", "book.txt.gz"])
def test_plain_text_is_one_document(tmp_path, name):
    text = "line\r\n\n  last line without an end \u00e9"
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read(tmp_path / name, ("body", "title")) == [text]


def test_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert read(path) == ["x"]


def test_broken_lines_are_named_and_the_rest_is_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"other": 1}',
        b'{"text": 7}',
        b'["text"]',
        b'{"text": "\xff"}',
        b'{"text": "half \\ud83d"}',
        b"[" * 100_000,
        b'{"text": "good too"}',
    ]
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    assert found[0] == "good" and found[-1] == "good too" and len(found) == len(lines)
    for number, reason in enumerate(
        ["JSON", "no key 'text'", "a number", "a list", "UTF-8", "surrogate", "JSON"], start=2
    ):
        assert f"{path}:{number}: " in found[number - 1] and reason in found[number - 1]


def test_keys_are_read_independently(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "title": null}\n{"title": "y"}\n')
    found = read(path, ("text", "title"))
    assert found[0] == "x" and "not a string but null" in found[1]
    assert "no key" in found[2] and found[3] == "y"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_compressed_files_cut_short(tmp_path, suffix):
    draw = random.Random(0)
    rows = "".join(json.dumps({"text": f"{draw.getrandbits(400)}"}) + "\n" for _ in range(12_000))
    whole = compress(rows.encode(), suffix)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    found = read(path)
    assert len(found) > 100 and "unreadable from here on" in found[-1]
    assert "all further documents" in found[-1]
    assert f"{path}:{len(found)}" in found[-1]
    for name in (f"b.jsonl{suffix}", f"b.txt{suffix}"):
        (tmp_path / name).write_bytes(b"this is not compressed")
        assert "unreadable" in read(tmp_path / name)[-1]


def test_zstandard_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").touch()
    without = [kind._replace(open=None) for kind in files.COMPRESSIONS if kind.suffix == ".zst"]
    monkeypatch.setattr(files, "COMPRESSIONS", without)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: .* pip install backports\.zstd"):
        find_files([str(tmp_path)])


def test_undecodable_text_file(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    assert read(path) == [f"{path}: not UTF-8 (byte 3)"]


@pytest.mark.parametrize("kind", ["", "gz"])
def test_an_archive_is_no_text(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{kind}") as archive:
        archive.add(__file__, "a.py")
    assert read(path) == [f"{path}: binary"]
