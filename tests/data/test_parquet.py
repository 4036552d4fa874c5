"""Parquet as text: a row is a document, whatever the file's layout; what is broken has its row."""

import random

import pytest

from megalong.data.formats import raw_documents, texts
from megalong.data.text.documents import BrokenDocument, Reading
from megalong.utils.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def read(path, *keys):
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
    assert read(path) == [{"text": row} for row in rows]
    documents = list(raw_documents(str(path), Reading(), pytest.fail))
    assert sum(document.size for document in documents) == path.stat().st_size
    assert documents[7].place == f"{path}:8"
    assert read(path, "title", "text")[0] == {"title": rows[0], "text": rows[0]}


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
    assert read(tmp_path / "a.txt") == [{"text": "PAR1 is a receptor"}]


def test_parquet_from_a_stream_is_refused(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with open(tmp_path / "a.parquet") as file, pytest.raises(UserError) as error:
        monkeypatch.setattr("sys.stdin", file)
        read("-")
    assert str(error.value).startswith("standard input: Parquet, which is read from its end")


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view"])
def test_kinds_of_strings(tmp_path, kind):
    column = pyarrow.array(["a", "b", "a"])
    if kind == "dictionary":
        column = column.dictionary_encode()
    else:
        column = column.cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"text": "a"}, {"text": "b"}, {"text": "a"}]


def test_what_is_no_text_is_named_by_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([b"good", b"\xff"]).buffers()
    )
    table = pyarrow.table({"text": broken, "n": [1, 2], "list": [["a"], ["b"]], "no": ["x", None]})
    parquet.write_table(table, path)
    first, second = read(path, "text", "n", "list", "no", "gone")
    assert first["text"] == "good" and first["no"] == "x"
    assert second["text"] == f"{path}:2: not UTF-8 (byte 0)"
    assert second["no"] == f"{path}:2: 'no' is not a string but null"
    for key in ("n", "list", "gone"):
        assert first[key] == f"{path}:1: no column {key!r} of strings"
    assert read(path, "body") == [f"{path}:1: no column 'body' (there are: text, n, list, no)"]


def test_broken_files(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"{random.Random(i).getrandbits(4000)}" for i in range(2000)]
    parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=500)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    [message] = read(path)
    assert message.startswith(f"{path}:1: unreadable from here on")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(20_000) + whole[middle + 20_000 :])
    found = read(path)
    assert 500 <= len(found) < 2000 and found[-2] == {"text": rows[len(found) - 2]}
    assert found[-1].startswith(f"{path}:{len(found)}: unreadable from here on")


def test_pages_are_compared_with_their_checksums(tmp_path):
    """Where the writer has left some: a changed letter is no error of the format."""
    path, rows = tmp_path / "a.parquet", ["one", "two", "three"]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    parquet.write_table(pyarrow.table({"text": rows}), path, write_page_checksum=True, **plain)
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    [message] = read(path)
    assert message.startswith(f"{path}:1: unreadable from here on") and "CRC" in message
