"""The quickstart's corpus: real, reproducible, and free of this machine's paths."""

import json

TOOL = "examples/quickstart/collect_python_source.py"


def test_the_whole_corpus(tmp_path, run_tool):
    done = run_tool(TOOL, "--output", tmp_path / "new" / "all.jsonl")
    assert done.returncode == 0, done.stderr
    content = (tmp_path / "new" / "all.jsonl").read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    size = sum(len(record["text"].encode()) for record in records)
    assert 6_000_000 < size < 15_000_000
    assert f"{len(records)} files, {size:,} bytes" in done.stdout
    paths = [record["path"] for record in records]
    assert len(set(paths)) == len(paths) > 300
    assert "argparse.py" in paths and "asyncio/tasks.py" in paths
    assert not any(path.startswith("/") or "test" in path.split("/") for path in paths)
    assert not any("site-packages" in path or "encodings/" in path for path in paths)
    assert paths != sorted(paths)
    # A split by documents is fair: the last tenth is not made of a few folders.
    assert len({path.split("/")[0] for path in paths[-len(paths) // 10 :]}) > 15


def test_max_bytes_and_order(tmp_path, corpus, corpus_texts, run_tool):
    assert sum(len(text.encode()) for text in corpus_texts) <= 1_000_000
    run_tool(TOOL, "--output", tmp_path / "again.jsonl", "--max-bytes", 1_000_000)
    assert (tmp_path / "again.jsonl").read_bytes() == corpus.read_bytes()
    done = run_tool(TOOL, "--output", tmp_path / "none.jsonl", "--max-bytes", 1)
    assert done.returncode == 2 and "--max-bytes" in done.stderr
    assert not list(tmp_path.glob("none*"))
