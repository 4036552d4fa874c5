"""tools/benchmarks/preprocess.py: a small run of it."""

import json
import sys

import pytest

from tests.launching import REPOSITORY, run

SCRIPT = REPOSITORY / "tools" / "benchmarks" / "preprocess.py"


@pytest.mark.long
def test_a_small_run(tmp_path, tokenizer_model):
    """All contenders that need no clone make the same tokens, of what has no U+2581."""
    sources = tmp_path / "sources"
    for number, text in enumerate(
        ("def f(x):\n    return x\n", 'tick = "\u2581"\n', "import os\n")
    ):
        (sources / str(number)).mkdir(parents=True)
        (sources / str(number) / "a.py").write_text(text)
    flags = ["--sources", str(sources), "--work", str(tmp_path), "--max-bytes", "9"]
    flags += ["--rounds", "1", "--workers", "2", "--tokenizer-model", tokenizer_model]
    done = run([sys.executable, str(SCRIPT), *flags])
    assert "as many tokens: ours, fast" in done.stdout
    results = json.loads((tmp_path / "preprocess.json").read_text())
    assert results["settings"]["documents"] == 1
    assert (tmp_path / "preprocess.md").read_text().count("\n") == 2 + 2
    assert (tmp_path / "preprocess.png").stat().st_size > 1000
