"""Folders of source code: a document a file, or a repository."""

import io
import json
import sys

import pytest

from megalong.data.text.files import find_files, total_size
from megalong.data.tokenizers.tokenizer import build_tokenizer
from megalong.utils.errors import UserError
from tests.data.test_preprocess import BYTES, TOOL, read_texts


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
