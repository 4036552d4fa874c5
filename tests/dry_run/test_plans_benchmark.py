"""tools/benchmarks/plans.py: its plans can be made, and its table says what came of them."""

import json
import sys

import pytest

from megalong.config.arguments import build_parser, given_values
from megalong.dry_run.layouts import possible_layouts
from tests.launching import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools" / "benchmarks"))
import plans


def test_segments_grow_to_the_whole_sequence():
    assert plans.pattern(2**20) == ([2**11, 2**14, 2**17, 2**20], [1, 8, 64, 512])
    lengths, rates = plans.pattern(2**30)
    assert lengths[-2:] == [2**29, 2**30] and rates[-2:] == [2**18, 2**19]


@pytest.mark.parametrize("name", plans.PLANS)
def test_there_are_layouts_of_each(name):
    words = plans.PLANS[name][2:]
    gpus = int(words[words.index("--gpus") + 1])
    parser = build_parser("")
    for flag in ("--cluster", "--gpus"):
        parser.add_argument(flag)
    parser.add_argument("--explain", action="store_true")
    values = given_values(vars(parser.parse_args(words)))
    values |= {"data_path": ("unread",), "tokenizer_type": "ByteTokenizer"}
    found = possible_layouts(values, gpus, 8)
    assert found.divisions
    assert all(d.rungs[0].training.global_batch_size == 1 for d in found.divisions)


def test_the_table_has_the_best_that_fits(tmp_path):
    def layout(seconds, fits):
        cost = {"total": seconds, "tokens_per_second": 2**20 / seconds, "mfu": 0.25}
        return {
            "layout": f"one of {seconds} s",
            "fits": fits,
            "cost": cost,
            "memory": {"weights": 2**31, "activations": 2**32},
            "host": 2**31,
            "traffic": {"sequence": {"all_gather": {"calls": 2, "bytes": 3 * 10**9}}},
        }

    fitting = {
        "gpus": 64,
        "gpus_per_node": 8,
        "layouts": [layout(1.0, False), layout(2.0, True), layout(3.0, True)],
    }
    (tmp_path / "125m_2e20_64.json").write_text(json.dumps(fitting))
    (tmp_path / "125m_2e20_1.json").write_text(
        json.dumps({"gpus": 1, "gpus_per_node": 8, "layouts": []})
    )
    text = plans.report(tmp_path)
    assert "| 125m_2e20_64 | 64 | 2 | 524,288 | 25.0% | 6.0 | 16 | 3 | one of 2.0 s |" in text
    assert "| 125m_2e20_1 | 1 | none fits |" in text
    assert "--preset longnet-llama-125m --cluster h100 --gpus 64 --seq-length 1048576" in text
