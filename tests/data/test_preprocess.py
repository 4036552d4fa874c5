"""tools/preprocess_data.py as a user runs it: what it writes, refuses, names and leaves behind."""

import gzip
import hashlib
import json
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megalong.data.text.documents import Reading
from megalong.data.tokenizers.tokenizer import build_tokenizer
from tests.data.conftest import tool_command, tool_environment

TOOL = "tools/preprocess_data.py"
BYTES = ("--tokenizer-type", "ByteTokenizer")


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_texts(prefix, tokenizer) -> list[str]:
    """Every document of a pair, through Megatron's own reader, as text."""
    dataset = IndexedDataset(str(prefix), mmap=True)
    return [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def wait_for(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def test_round_trip_of_every_document(tmp_path, corpus, corpus_texts, tokenizer_model, run_tool):
    done = run_tool(
        TOOL,
        *("--input", corpus, "--output-prefix", tmp_path / "out" / "code", "--append-eod"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer_model),
    )
    assert done.returncode == 0, done.stderr
    prefix = tmp_path / "out" / "code_text_document"
    assert names(tmp_path / "out") == {prefix.name + s for s in (".bin", ".idx", ".json")}
    tokenizer = build_tokenizer("SentencePieceTokenizer", tokenizer_model)
    assert read_texts(prefix, tokenizer) == corpus_texts

    dataset = IndexedDataset(str(prefix), mmap=True)
    assert dataset.index.dtype is np.uint16
    assert dataset.document_indices.tolist() == list(range(len(corpus_texts) + 1))
    assert all(dataset[i][-1] == tokenizer.eod for i in range(len(dataset)))
    tokens = np.fromfile(f"{prefix}.bin", np.uint16)
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    size = sum(len(text.encode()) for text in corpus_texts)
    assert (
        sidecar.items()
        >= {
            "documents": len(corpus_texts),
            "tokens": len(tokens),
            "bytes": size,
            "longest_document": int(dataset.sequence_lengths.max()),
            "max_token_id": int(tokens.max()),
            "tokenizer_type": "SentencePieceTokenizer",
            "tokenizer_model": tokenizer_model,
            "tokenizer_sha256": tokenizer.fingerprint,
            "vocab_size": 1024,
            "eod": 1,
            "append_eod": True,
            "prepend_bos": False,
            "version": 2,
        }.items()
    )
    assert f"{len(corpus_texts)} documents, {len(tokens):,} tokens, {size:,} bytes" in done.stdout
    assert f"{size / len(tokens):.3f} bytes per token" in done.stdout
    assert "0 documents skipped" in done.stdout


def test_keys_gzip_folders_and_plain_text(tmp_path, run_tool):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    first = write_jsonl(tmp_path / "first.jsonl", [{"text": "a", "title": "A\n"}])
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress(b'{"title": "B", "text": "b"}\n\n{"text": "c", "title": ""}')
    )
    (folder / "sub" / "z.txt").write_bytes(b"plain\r\n")
    done = run_tool(
        TOOL,
        *("--input", first, folder, "--json-keys", "text", "title"),
        *("--output-prefix", tmp_path / "out", *BYTES),
    )
    assert done.returncode == 0, done.stderr
    tokenizer = build_tokenizer("ByteTokenizer")
    assert read_texts(tmp_path / "out_text_document", tokenizer) == ["a", "b", "c", "plain\r\n"]
    assert read_texts(tmp_path / "out_title_document", tokenizer) == ["A\n", "B"]
    assert "1 empty" in done.stdout


def test_process_substitution(tmp_path, corpus):
    """A pipe that the shell makes, beside a compressed standard input."""
    compressed = tmp_path / "corpus"
    compressed.write_bytes(gzip.compress(corpus.read_bytes()))
    prefix = tmp_path / "out" / "x"
    command = shlex.join(tool_command(TOOL, "--output-prefix", prefix, *BYTES))
    done = subprocess.run(
        ["bash", "-c", f"{command} --input <(cat {corpus}) - < {compressed}"],
        env=tool_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"] for line in corpus.read_bytes().splitlines()]
    found = read_texts(f"{prefix}_text_document", build_tokenizer("ByteTokenizer"))
    assert found == texts + texts
    inputs = json.loads(Path(f"{prefix}_text_document.json").read_text())["inputs"]
    assert {stream["sha256"] for stream in inputs} == {
        hashlib.sha256(corpus.read_bytes()).hexdigest()
    }
    assert inputs[0]["path"].startswith("/dev/fd/") and inputs[1]["path"] == "-"


def test_output_is_the_same_with_any_number_of_workers(tmp_path, corpus, run_tool):
    lines = corpus.read_bytes().splitlines(keepends=True)
    for part in range(3):
        (tmp_path / f"{part}.jsonl").write_bytes(b"".join(lines[part::3]) + b"broken\n")
    for i in range(200):
        (tmp_path / f"small{i}.py").write_text(f"x = {i}\n" * i)
    results = {}
    for workers in (1, 3):
        prefix = tmp_path / "out" / str(workers)
        done = run_tool(
            TOOL,
            *("--input", tmp_path / "*.jsonl", tmp_path / "*.py", "--output-prefix", prefix),
            *("--workers", workers, *BYTES),
        )
        assert done.returncode == 0, done.stderr
        assert "3 documents skipped" in done.stdout
        named = [line for line in done.stderr.splitlines() if line.startswith("skipped")]
        files = [Path(f"{prefix}_text_document{s}").read_bytes() for s in (".bin", ".idx", ".json")]
        results[workers] = named, files
    assert results[1] == results[3] and len(results[1][0]) == 3


def test_broken_documents_are_named_counted_and_left_out(tmp_path, run_tool):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "x"}\n{"text": \n{"no": 1}\n{"text": []}\n\xff\n{"text": "y"}\n')
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xfe")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"text": "lost"}\n' * 99)[:20])
    arguments = ("--input", path, bad, cut, "--output-prefix", tmp_path / "out", *BYTES)
    done = run_tool(TOOL, *arguments)
    assert done.returncode == 0
    assert read_texts(tmp_path / "out_text_document", build_tokenizer("ByteTokenizer")) == [
        "x",
        "y",
    ]
    for number in (2, 3, 4, 5):
        assert f"skipped {path}:{number}: " in done.stderr
    assert f"skipped {bad}: not UTF-8" in done.stderr
    assert "6 documents skipped, and the rest of 1 file," in done.stdout

    before = names(tmp_path)
    done = run_tool(TOOL, *arguments, "--overwrite", "--strict")
    assert done.returncode == 2 and f"error: {path}:2: not valid JSON" in done.stderr
    assert names(tmp_path) == before  # the earlier output is untouched


def test_large_vocabularies_are_int32(tmp_path, monkeypatch):
    from megalong.data.preprocessing import preprocess as module
    from megalong.utils.progress import progress_bar

    class Large:
        vocab_size, eod, fingerprint = 65_500, 65_499, "f"

        def encode_array(self, text):
            return np.full(len(text), 65_498)

    monkeypatch.setattr(module, "build_tokenizer", lambda *_: Large())
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "xyz"}])
    module.preprocess(
        [str(path)],
        str(tmp_path / "out"),
        module.TokenizingTask("Large", None, Reading(), append_eod=True),
        progress=progress_bar(1, "B", "", enabled=False),
    )
    dataset = IndexedDataset(str(tmp_path / "out_text_document"), mmap=True)
    assert dataset.index.dtype is np.int32
    assert dataset[0].tolist() == [65_498] * 3 + [65_499]
    sidecar = json.loads((tmp_path / "out_text_document.json").read_text())
    assert sidecar["max_token_id"] == 65_499


def test_existing_output_is_refused_or_replaced(tmp_path, run_tool):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "old"}])
    arguments = ("--input", path, "--output-prefix", tmp_path / "out", *BYTES)
    assert run_tool(TOOL, *arguments).returncode == 0
    write_jsonl(path, [{"text": "new"}])
    done = run_tool(TOOL, *arguments)
    assert done.returncode == 2 and "out_text_document.bin is there already" in done.stderr
    tokenizer = build_tokenizer("ByteTokenizer")
    assert read_texts(tmp_path / "out_text_document", tokenizer) == ["old"]
    assert run_tool(TOOL, *arguments, "--overwrite").returncode == 0
    assert read_texts(tmp_path / "out_text_document", tokenizer) == ["new"]


def test_bad_input_is_one_clear_error(tmp_path, run_tool):
    def failure(*arguments) -> str:
        done = run_tool(TOOL, "--output-prefix", tmp_path / "out" / "x", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
        assert not names(tmp_path / "out")
        return done.stderr.splitlines()[-1]

    empty = tmp_path / "empty.jsonl"
    empty.touch()
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "x"}])
    assert "error: --input" in failure("--input", tmp_path / "*.nothing", *BYTES)
    assert "no document with text" in failure("--input", empty, *BYTES)
    assert "'body'" in failure("--input", one, "--json-keys", "body", *BYTES)
    assert "named twice" in failure("--input", one, "--json-keys", "text", "text", *BYTES)
    sentencepiece = ("--tokenizer-type", "SentencePieceTokenizer")
    assert "--tokenizer-model" in failure("--input", one, *sentencepiece)
    assert "no such file" in failure("--input", one, *sentencepiece, "--tokenizer-model", "none")
    assert "--partition 5/3: k/n is expected" in failure(
        "--input", one, *BYTES, "--partition", "5/3"
    )
    assert "--min-tokens must be" in failure("--input", one, *BYTES, "--min-tokens", "0")
    assert "no file can be made there" in failure(
        "--input", one, *BYTES, "--output-prefix", "/sys/kernel/x"
    )


@pytest.fixture
def long_job(tmp_path, corpus, tokenizer_model, start_tool):
    """Starts a run of some seconds with two workers; gives it once it has begun to write."""
    for i in range(30):
        os.symlink(corpus, tmp_path / f"{i}.jsonl")
    partial = tmp_path / "out" / "x.unfinished" / "x_text_document.bin"
    arguments = (
        *("--input", tmp_path / "*.jsonl", "--output-prefix", tmp_path / "out" / "x"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer_model),
        *("--workers", 2, "--tokenizer-backend", "usual"),
    )
    process = start_tool(TOOL, *arguments)
    wait_for(lambda: partial.exists() and partial.stat().st_size > 0)
    assert process.poll() is None
    return process, arguments


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_run_leaves_nothing_under_the_final_name(tmp_path, long_job, run_tool):
    process, _ = long_job
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    assert not {name for name in names(tmp_path / "out") if not name.endswith(".unfinished")}
    wait_for(lambda: not any(map(is_running, workers)))  # nobody is left waiting for it

    path = write_jsonl(tmp_path / "short.json", [{"text": "x"}])
    done = run_tool(TOOL, "--input", path, "--output-prefix", tmp_path / "out" / "x", *BYTES)
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "out") == {f"x_text_document{s}" for s in (".bin", ".idx", ".json")}
    tokenizer = build_tokenizer("ByteTokenizer")
    assert read_texts(tmp_path / "out" / "x_text_document", tokenizer) == ["x"]


def test_a_killed_worker_and_a_killed_run_lose_no_finished_part(
    tmp_path, corpus, tokenizer_model, start_tool, run_tool
):
    for i in range(12):
        os.symlink(corpus, tmp_path / f"{i:02}.jsonl")
    tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer_model)
    tokenizer = (*tokenizer, "--tokenizer-backend", "usual")
    once = ("--input", corpus, "--output-prefix", tmp_path / "once", *tokenizer)
    assert run_tool(TOOL, *once).returncode == 0
    arguments = ("--input", tmp_path / "*.jsonl", "--output-prefix", tmp_path / "out" / "x")
    arguments = (*arguments, *tokenizer, "--workers", 2, "--part-bytes", 1000)
    state = tmp_path / "out" / "x.unfinished" / "state.json"
    seen = b""

    def new_part() -> bool:
        nonlocal seen
        before, seen = seen, state.read_bytes() if state.exists() else b""
        return seen != before

    process = start_tool(TOOL, *arguments)
    wait_for(new_part)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2 and "error: a tokenizing worker died near " in stderr
    assert "the same command goes on from there" in stderr and "Traceback" not in stderr

    new_part()
    process = start_tool(TOOL, *arguments)
    wait_for(new_part)
    workers = workers_of(process.pid)
    process.kill()
    _, stderr = process.communicate(timeout=20)
    assert "x.unfinished: going on behind " in stderr
    wait_for(lambda: not any(map(is_running, workers)))

    done = run_tool(TOOL, *arguments)
    assert done.returncode == 0 and "x.unfinished: going on behind " in done.stderr
    assert names(tmp_path / "out") == {f"x_text_document{s}" for s in (".bin", ".idx", ".json")}
    one, all_of_them = (
        Path(f"{tmp_path / prefix}_text_document.bin").read_bytes() for prefix in ("once", "out/x")
    )
    assert all_of_them == 12 * one


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_cleans_up(tmp_path, long_job, sent, status):
    process, _ = long_job
    workers = workers_of(process.pid)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status and "Traceback" not in stderr
    assert stderr.endswith("interrupted: nothing was written\n")
    assert not names(tmp_path / "out")
    wait_for(lambda: not any(map(is_running, workers)))


def test_two_runs_do_not_write_the_same_output(tmp_path, long_job, run_tool):
    process, arguments = long_job
    done = run_tool(TOOL, *arguments)
    assert done.returncode == 2 and "another process is writing" in done.stderr
    assert process.poll() is None and names(tmp_path / "out") == {"x.unfinished"}
