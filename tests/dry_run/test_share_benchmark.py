"""tools/benchmarks/share.py: what it is asked, and a small run of it."""

import json
import subprocess
import sys

import pytest

from tests.launching import REPOSITORY

SCRIPT = REPOSITORY / "tools" / "benchmarks" / "share.py"
sys.path.insert(0, str(SCRIPT.parent))
import share  # noqa: E402


@pytest.mark.parametrize(
    ("flags", "flag"),
    [
        ("--tokens 2**30 --ranks 1000", "--tokens 1073741824"),
        ("--tokens 2**20 --shard-length 2**20", "--shard-length"),
        ("--tokens 1e9", "--tokens"),
        ("--tokens 2**20 --ranks 16 --rank 16", "--rank 16"),
        ("--tokens 2**20 --ranks 16 --rank end", "--rank end"),
        ("--tokens 2**20 --ranks 16 --heads 5", "--heads"),
        ("--tokens 2**20 --ranks 16 --repeats 0", "--repeats"),
    ],
)
def test_bad_flags_name_what_to_change(flags, flag, capsys):
    with pytest.raises(SystemExit):
        share.parse_arguments(flags.split())
    assert flag in capsys.readouterr().err.splitlines()[-1]


def test_what_is_measured():
    flags = ["--tokens", "2**20", "1Gi", "--shard-length", "64Ki", "--rank", "first", "last"]
    found = share.cases(share.parse_arguments(flags))
    assert [(case["ranks"], case["rank"]) for case in found] == [
        (16, 0), (16, 15), (2**14, 0), (2**14, 2**14 - 1),
    ]  # fmt: skip
    assert found[-1]["branches"][-1] == (2**30, 4**10)
    found = share.cases(share.parse_arguments([*flags, "--spanning-rows", "2**14"]))
    assert found[2]["branches"] == ((2048, 1), (8192, 4), (32768, 16), (2**30, 2**16))


@pytest.mark.long
def test_a_small_run(tmp_path):
    flags = "--tokens 2**15 2**16 --shard-length 2**13 --first-segment 256 --spanning-rows 32"
    command = [sys.executable, str(SCRIPT), *flags.split(), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads((tmp_path / "share.json").read_text())["rows"]
    assert [(row["part"], row["rank"]) for row in rows] == [
        ("attention", 3), ("attention", 7), ("step", 3), ("step", 7),
    ]  # fmt: skip
    for row in rows:
        calls = 1 if row["part"] == "attention" else 4  # the memory path takes a head at a time
        assert all(value > 0 for value in row["seconds"].values()) and row["peak"] > 2**20
        for collective in ("all_gather", "reduce_scatter"):  # 32 rows of keys and of values
            assert row["per_layer"][collective] == {"calls": calls, "bytes": 32 * 4 * 2 * 16 * 4}
    assert (tmp_path / "share.md").read_text().count("| 65,536 | 8 | 7 |") == 2
    assert (tmp_path / "share.png").stat().st_size > 5_000
