"""What every test shares: one thread per process, and a small corpus of real text."""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# A shell's background jobs ignore it, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, and inherited by every process that a test starts: tests run side by
# side, and bit-for-bit comparisons want the same number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

# Several ranks of this machine cannot share a GPU; the tests of kernels on one do not ask for this.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Transformers copies the code of exported models there: a place for each test process. And nothing
# in the tests may go looking on the hub.
_MODEL_CODE = tempfile.TemporaryDirectory(prefix="megalong-tests-")
os.environ["HF_MODULES_CACHE"] = _MODEL_CODE.name
os.environ["HF_HUB_OFFLINE"] = "1"

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """No collection of garbage need look at what is imported by then."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is frozen at the end, Triton's bindings report as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Prefix of a preprocessed corpus: 60 modules of the standard library, one token a byte."""
    folder = tmp_path_factory.mktemp("corpus")
    modules = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:60]
    with (folder / "text.jsonl").open("w") as file:
        for module in modules:
            text = module.read_text(encoding="utf-8", errors="ignore")[:4000]
            file.write(json.dumps({"text": text}) + "\n")
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py")]
    command += ["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "code")]
    command += ["--tokenizer-type", "ByteTokenizer", "--append-eod"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "code_text_document"
