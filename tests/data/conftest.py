"""Real inputs for the data tests: a corpus, a tokenizer trained on it, the tools as commands."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megalong.data.preprocessing.writer import DocumentWriter

ROOT = Path(__file__).resolve().parents[2]


def tool_command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def tool_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def run_tool():
    """Runs a script of the repository as a user would; gives the finished process."""

    def run(script: str, *arguments) -> subprocess.CompletedProcess:
        return subprocess.run(
            tool_command(script, *arguments),
            env=tool_environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture(scope="session")
def start_tool():
    """Starts a script in the background; it is killed if the test leaves it running."""
    started = []

    def start(script: str, *arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            tool_command(script, *arguments),
            env=tool_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs inherit that SIGINT is ignored; the tool must not.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, run_tool) -> Path:
    """1 MB of the standard library as JSON lines."""
    path = tmp_path_factory.mktemp("corpus") / "stdlib.jsonl"
    done = run_tool(
        "examples/quickstart/collect_python_source.py", "--output", path, "--max-bytes", 1_000_000
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def corpus_texts(corpus) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_bytes().splitlines()]


@pytest.fixture(scope="session")
def tokenizer_model(corpus, run_tool) -> str:
    """A SentencePiece model of 1024 ids."""
    prefix = corpus.with_name("tokenizer")
    done = run_tool(
        "tools/train_tokenizer.py",
        *("--input", corpus, "--output-prefix", prefix, "--vocab-size", 1024),
    )
    assert done.returncode == 0, done.stderr
    return f"{prefix}.model"


@pytest.fixture
def write_documents(tmp_path):
    """Writes lists of token ids as a .bin/.idx/.json of megalong; gives the prefix."""

    def write(documents: list[list[int]], name: str = "documents", dtype=np.uint16) -> str:
        prefix = str(tmp_path / name)
        with DocumentWriter(prefix, dtype) as writer:
            tokens = np.array([token for document in documents for token in document], dtype)
            writer.add(tokens, [len(document) for document in documents])
            writer.commit({"max_token_id": int(tokens.max(initial=0))})
        return prefix

    return write
