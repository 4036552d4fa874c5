"""Finding files and reading documents: kinds of file, broken content, names of places."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import sys
import tarfile
import threading

import pytest

from megalong.data.formats import raw_documents, texts
from megalong.data.text import files
from megalong.data.text.documents import BrokenDocument, Reading
from megalong.data.text.files import find_files, is_stream, total_size
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from tests.data.test_preprocess import BYTES, TOOL, read_texts


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


@pytest.fixture
def trees(tmp_path):
    """Two repositories beside each other, and what is in them by path."""
    files = {
        "b/README": b"two\n",
        "b/z/last.c": b"int z;",
        "b/a.c": b"int a;\n",
        "b/.git/config": b"hidden",
        "b/logo.png": b"\x89PNG\0\0",
        "b/large.txt": b"x" * 3000,
        "b/latin1.c": b"\xe9",
        "a/src/package.json": b'{"name": 1}\n',
        "a/main.py": b"",
    }
    for name, content in files.items():
        path = tmp_path / "trees" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "trees"


REPOSITORIES = [
    '==> main.py <==\n\n\n==> src/package.json <==\n{"name": 1}\n',
    "==> README <==\ntwo\n\n==> a.c <==\nint a;\n\n==> z/last.c <==\nint z;\n",
]


@pytest.mark.parametrize("given", ["", "*"])
def test_a_repository_a_document(trees, tmp_path, run_tool, given):
    done = run_tool(
        TOOL,
        *("--input", trees / given, "--output-prefix", tmp_path / "out", *BYTES),
        *("--documents", "repository", "--max-file-size", 2000),
    )
    assert done.returncode == 0, done.stderr
    tokenizer = build_tokenizer("ByteTokenizer")
    assert read_texts(tmp_path / "out_text_document", tokenizer) == REPOSITORIES
    assert f"skipped {trees}/b/latin1.c: not UTF-8 (byte 0)" in done.stderr
    assert "1 document skipped, 1 binary file left out, 1 too large file left out," in done.stdout
    assert "2 folders, 1 document skipped" in done.stdout


def test_a_folder_with_files_of_its_own_is_one_repository(trees):
    (trees / "README").touch()
    assert find_files([str(trees)], "repository") == [str(trees)]
    assert total_size([str(trees)]) == total_size(find_files([str(trees)]))
    with pytest.raises(UserError, match="a file; --documents repository wants folders"):
        find_files([str(trees / "README")], "repository")


def test_a_file_a_document_whatever_its_name(trees, tmp_path, run_tool):
    done = run_tool(
        TOOL,
        *("--input", trees, "--output-prefix", tmp_path / "out", *BYTES),
        *("--documents", "file", "--max-file-size", 2000),
    )
    assert done.returncode == 0, done.stderr
    found = read_texts(tmp_path / "out_text_document", build_tokenizer("ByteTokenizer"))
    assert found == ['{"name": 1}\n', "two\n", "int a;\n", "int z;"]
    assert "1 document skipped, 1 binary file left out, 1 too large file left out," in done.stdout


@pytest.mark.parametrize("documents", ["auto", "file"])
def test_standard_input(tmp_path, monkeypatch, capsys, documents):
    from tools import preprocess_data

    content = "".join(json.dumps({"text": text}) + "\n" for text in ["x", "y"])
    (tmp_path / "in").write_text(content)
    with (tmp_path / "in").open() as file:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file.buffer))
        command = ["tool", "--input", "-", "--output-prefix", str(tmp_path / "out"), *BYTES]
        monkeypatch.setattr(sys, "argv", [*command, "--documents", documents])
        assert preprocess_data.main() is None
    found = read_texts(tmp_path / "out_text_document", build_tokenizer("ByteTokenizer"))
    assert found == (["x", "y"] if documents == "auto" else [content])


pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def read_rows(path, *keys):
    """The texts of all rows, or their messages."""
    found, reading = [], Reading(keys or ("text",))
    for document in raw_documents(str(path), reading, pytest.fail):
        try:
            found.append({key: str(value) for key, value in texts(document, reading).items()})
        except BrokenDocument as error:
            found.append(str(error))
    return found


def test_rows_in_order_with_sizes_that_add_up(tmp_path):
    draw, path = random.Random(0), tmp_path / "a.parquet"
    rows = ["x" * draw.randrange(9000) + f"\u00e9\n{i}" for i in range(3000)] + [""]
    table = pyarrow.table({"n": range(len(rows)), "text": rows, "title": list(map(str, rows))})
    parquet.write_table(table, path, row_group_size=1700, compression="zstd")
    assert read_rows(path) == [{"text": row} for row in rows]
    documents = list(raw_documents(str(path), Reading(), pytest.fail))
    assert sum(document.size for document in documents) == path.stat().st_size
    assert documents[7].place == f"{path}:8"
    assert read_rows(path, "title", "text")[0] == {"title": rows[0], "text": rows[0]}


@pytest.mark.parametrize("name", ["part-0", "a.jsonl", "a.txt"])
def test_parquet_is_known_by_its_content(tmp_path, name, monkeypatch):
    said, path = [], tmp_path / name
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    [document] = raw_documents(str(path), Reading(), said.append)
    assert texts(document, Reading()) == {"text": "a"}
    assert said == [f"{path}: taken for Parquet, which it holds, whatever its name"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{name}: Parquet needs pyarrow: pip install pyarrow"):
        list(raw_documents(str(path), Reading(), said.append))


def test_a_text_that_begins_like_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("PAR1 is a receptor")
    assert read_rows(tmp_path / "a.txt") == [{"text": "PAR1 is a receptor"}]


def test_parquet_from_a_stream_is_refused(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with open(tmp_path / "a.parquet") as file, pytest.raises(UserError) as error:
        monkeypatch.setattr("sys.stdin", file)
        read_rows("-")
    assert str(error.value).startswith("standard input: Parquet, which is read from its end")


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view"])
def test_kinds_of_strings(tmp_path, kind):
    column = pyarrow.array(["a", "b", "a"])
    if kind == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"text": "a"}, {"text": "b"}, {"text": "a"}]


def test_what_is_no_text_is_named_by_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([b"good", b"\xff"]).buffers()
    )
    table = pyarrow.table({"text": broken, "n": [1, 2], "list": [["a"], ["b"]], "no": ["x", None]})
    parquet.write_table(table, path)
    first, second = read_rows(path, "text", "n", "list", "no", "gone")
    assert first["text"] == "good" and first["no"] == "x"
    assert second["text"] == f"{path}:2: not UTF-8 (byte 0)"
    assert second["no"] == f"{path}:2: 'no' is not a string but null"
    for key in ("n", "list", "gone"):
        assert first[key] == f"{path}:1: no column {key!r} of strings"
    assert read_rows(path, "body") == [f"{path}:1: no column 'body' (there are: text, n, list, no)"]


def test_broken_files(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"{random.Random(i).getrandbits(4000)}" for i in range(2000)]
    parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=500)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    [message] = read_rows(path)
    assert message.startswith(f"{path}:1: unreadable from here on")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(20_000) + whole[middle + 20_000 :])
    found = read_rows(path)
    assert 500 <= len(found) < 2000 and found[-2] == {"text": rows[len(found) - 2]}
    assert found[-1].startswith(f"{path}:{len(found)}: unreadable from here on")


def test_pages_are_compared_with_their_checksums(tmp_path):
    """Where the writer has left some: a changed letter is no error of the format."""
    path, rows = tmp_path / "a.parquet", ["one", "two", "three"]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": rows}), path, write_page_checksum=True, **plain)
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    [message] = read_rows(path)
    assert message.startswith(f"{path}:1: unreadable from here on") and "CRC" in message
