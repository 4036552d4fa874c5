"""Run the interpret_*.py files where the kernels are interpreted: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("interpret_kernels.py", "interpret_documents.py")


def interpret(*options: str, **variables: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", **variables}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *(p for p in sys.path if p)])
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(HERE / name) for name in FILES] + [*options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


def test_kernels_in_the_interpreter():
    interpret()


@pytest.mark.long
def test_many_random_cases_in_the_interpreter():
    interpret("-k", "test_random", RANDOM_CASES="300")


@pytest.mark.long
def test_the_long_ones_in_the_interpreter():
    interpret("-m", "long")
