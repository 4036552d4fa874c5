"""examples/experiments/fetch_corpus.py: of a package made here, nothing is fetched."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest

from megalong.utils.errors import UserError
from tests.launching import REPOSITORY, run_here

SCRIPT = REPOSITORY / "examples" / "experiments" / "fetch_corpus.py"
sys.path.insert(0, str(SCRIPT.parent))
from fetch_corpus import drop_what_was_seen  # noqa: E402
from overlap import seen_shares  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not here")


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """A folder with two packages: directories of sources in an archive, and compressed texts."""
    folder = tmp_path_factory.mktemp("packages")
    package(folder, "sources", archived_tree)
    package(folder, "doc-texts", plain_texts)
    return folder


def package(folder, name, fill):
    root = folder / f"{name}.root"
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1-1\nArchitecture: all\nMaintainer: none <none@none>\n"
    (root / "DEBIAN" / "control").write_text(control + "Description: none\n")
    fill(root)
    command = ["dpkg-deb", "--build", str(root), str(folder / f"{name}_1-1_all.deb")]
    subprocess.run(command, check=True, capture_output=True)


def archived_tree(root):
    tree = root / "tree-1.0"
    for i in range(40):
        (tree / f"part{i}").mkdir(parents=True)
        (tree / f"part{i}" / "b.c").write_text(f"second of {i}\n" * 20)
        (tree / f"part{i}" / "a.c").write_text(f"first of {i}\n" * 20)
        (tree / f"part{i}" / "c.bin").write_bytes(b"\0" * 100)
    (tree / "tests").mkdir()
    (tree / "tests" / "long.c").write_text("tested\n" * 1000)
    (tree / "short").mkdir()
    (tree / "short" / "short.c").write_text("short\n")
    (tree / "again").mkdir()
    for name in ("a.c", "b.c"):
        shutil.copy(tree / "part0" / name, tree / "again" / name)
    (root / "usr" / "src").mkdir(parents=True)
    with tarfile.open(root / "usr" / "src" / "tree.tar.xz", "w:xz") as archive:
        archive.add(tree, "tree-1.0")
    shutil.rmtree(tree)


def plain_texts(root):
    import gzip

    folder = root / "usr" / "share" / "doc" / "texts"
    folder.mkdir(parents=True)
    for i in range(10):
        (folder / f"{i}.txt.gz").write_bytes(gzip.compress(f"text {i}\n".encode() * 100))


def fetch(packages, output, *more, check=True):
    flags = ["--packages", "sources", "doc-texts", "--packages-folder", packages]
    flags += ["--min-bytes", 300, "--max-document-bytes", 450, "--held-out-share", 0.3]
    return run_here(SCRIPT, *flags, "--output", output, *more, check=check)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_directories_and_texts_are_documents_and_some_are_held_out(packages, tmp_path):
    fetch(packages, tmp_path)
    train, held_out = (records(tmp_path / f"{part}.jsonl") for part in ("train", "held_out"))
    texts = {record["path"]: record["text"] for record in train + held_out}
    assert len(texts) == len(train) + len(held_out) == 40 + 10  # short, tests and again left out
    assert not any("tests" in path or "short" in path for path in texts)
    whole = "first of 7\n" * 20 + "\n" + "second of 7\n" * 20
    assert texts["sources/tree-1.0/part7"] == whole[:450]
    assert texts["doc-texts/usr/share/doc/texts/3.txt.gz"] == ("text 3\n" * 100)[:450]
    assert 5 < len(held_out) < 30
    about = json.loads((tmp_path / "corpus.json").read_text())
    assert sum(about["held_out"]["documents"].values()) == len(held_out)
    assert about["held_out"]["bytes"] == sum(len(record["text"]) for record in held_out)
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen == {record["path"]: 0.0 for record in held_out}
    assert about["packages"]["sources"]["file"] == "sources_1-1_all.deb"
    assert str(tmp_path) not in (tmp_path / "corpus.json").read_text()


def test_a_larger_corpus_has_the_documents_of_a_smaller_one(packages, tmp_path):
    fetch(packages, tmp_path / "all")
    few = ("--max-bytes", 5000, "--max-held-out-bytes", 1000)
    fetch(packages, tmp_path / "few", *few)
    fetch(packages, tmp_path / "cut", *few, "--held-out-document-bytes", 100)
    cut = records(tmp_path / "cut" / "held_out.jsonl")
    assert {len(record["text"]) for record in cut} == {100}
    for part in ("train", "held_out"):
        every, few = (records(tmp_path / size / f"{part}.jsonl") for size in ("all", "few"))
        assert 0 < len(few) < len(every) and every[: len(few)] == few


def test_how_much_of_a_held_out_document_is_in_others(tmp_path):
    def write(name, **texts):
        lines = [json.dumps({"path": path, "text": text}) for path, text in texts.items()]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    held_out = write("held_out", half="1\n2\n3\n4\n5\n6\n7\n", new="9\n8\n7\n6\n5\n", few="1\n2\n")
    # 1 to 5 in this order are two runs of four; 5 to 7, in another document, are none.
    train = write("train", a="0\n 1\n2\n\n3\n4\n5", b="5\n6\n7")
    assert seen_shares(train, held_out) == {"half": 0.5, "new": 0.0, "few": 0.0}
    assert drop_what_was_seen(train, held_out, 0.4) == {"new": 0.0, "few": 0.0}
    assert [record["path"] for record in records(held_out)] == ["new", "few"]
    train = write("train", a="9\n8\n7\n6\n5")
    assert drop_what_was_seen(train, held_out, 1.0) == {"new": 1.0, "few": 0.0}
    with pytest.raises(UserError, match="max-seen-share"):
        drop_what_was_seen(train, write("held_out", new="9\n8\n7\n6\n"), 0.1)


def test_what_cannot_be_had_is_refused(packages, tmp_path):
    flags = ["--packages", "no-such-package-at-all", "--packages-folder", tmp_path]
    refused = run_here(SCRIPT, *flags, "--output", tmp_path / "out", check=False)
    assert refused.returncode == 2 and "error: apt-get" in refused.stderr
    refused = fetch(packages, tmp_path, "--min-bytes", 10**9, check=False)
    assert refused.returncode == 2 and "no document has --min-bytes" in refused.stderr
