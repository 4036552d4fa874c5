"""tools/benchmarks/billion.py: what it is asked, and a small run of it."""

import argparse
import json
import subprocess
import sys

import pytest

from tests.launching import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "benchmarks" / "billion.py"
sys.path.insert(0, str(SCRIPT.parent))
import billion  # noqa: E402


@pytest.mark.parametrize(
    ("text", "value"),
    [("2**30", 2**30), ("1_073_741_824", 2**30), ("1Gi", 2**30), ("64Ki", 2**16), ("7", 7)],
)
def test_numbers_as_people_write_them(text, value):
    assert billion.count(text) == value


@pytest.mark.parametrize("text", ["", "0", "-4", "1e9", "2**", "1G", "2**30.5", "1 000"])
def test_other_numbers_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 1048576, 2\\*\\*20 or 1Mi"):
        billion.count(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--tokens 2**30 --ranks 1000", "--tokens 1073741824 must be a multiple of --ranks 1000"),
        ("--tokens 2**20 --shard-length 2**20", "at least twice it"),
        ("--tokens 2**20 --ranks 16 --rank 16", "--rank 16: first, middle, last, or from 0 to 15"),
        ("--tokens 2**20 --ranks 16 --rank end", "--rank end: first, middle, last"),
        ("--tokens 2**20 --ranks 16 --heads 5", "--heads must divide --hidden-size"),
        ("--tokens 2**20 --ranks 16 --repeats 0", "--repeats must be at least 1"),
    ],
)
def test_bad_flags_name_what_to_change(flags, words, capsys):
    with pytest.raises(SystemExit):
        billion.parse_arguments(flags.split())
    assert words in capsys.readouterr().err


def test_what_is_measured():
    flags = "--tokens 2**20 2**30 --shard-length 2**16 --rank first last"
    found = billion.cases(billion.parse_arguments(flags.split()))
    assert [(case["ranks"], case["rank"]) for case in found] == [
        (16, 0), (16, 15), (2**14, 0), (2**14, 2**14 - 1),
    ]  # fmt: skip
    assert found[-1]["branches"][-1] == (2**30, 4**10)
    found = billion.cases(billion.parse_arguments([*flags.split(), "--spanning-rows", "2**14"]))
    assert found[0]["branches"] == ((2048, 1), (8192, 4), (32768, 16), (2**20, 2**6))
    assert found[2]["branches"] == ((2048, 1), (8192, 4), (32768, 16), (2**30, 2**16))


@pytest.mark.long
def test_a_small_run(tmp_path):
    flags = "--tokens 2**15 2**16 --shard-length 2**13 --first-segment 256 --spanning-rows 32"
    command = [sys.executable, str(SCRIPT), *flags.split(), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    report = json.loads((tmp_path / "billion.json").read_text())
    for part, calls in (("attention", 1), ("step", 4)):  # the memory path takes a head at a time
        assert [row["rank"] for row in report[part]] == [3, 7]
        for row in report[part]:
            assert row["seconds"] and all(value > 0 for value in row["seconds"].values())
            assert row["peak"] > 2**20
            for collective in ("all_gather", "reduce_scatter"):  # 32 rows of keys and of values
                moved = {"calls": calls, "bytes": 32 * 4 * 2 * 16 * 4}
                assert row["per_layer"][collective] == moved
    assert "| 65,536 | 8 | 7 |" in (tmp_path / "billion.md").read_text()
    assert (tmp_path / "billion.png").stat().st_size > 10_000
