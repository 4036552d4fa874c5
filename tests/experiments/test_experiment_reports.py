"""The reports of examples/experiments, of cells that are made up: means and spreads, differences
seed by seed, power laws, a seed that is compared with the others."""

import json
import math
import sys
from pathlib import Path

import pytest

from megalong.utils.errors import UserError
from tests.launching import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples" / "experiments"))
from another_seed import check_others, write_check
from report import write_report
from statistics_of_seeds import PowerLaw, Spread


def test_a_power_law_is_found_with_its_error():
    compute = [1e9, 1e10, 1e11, 1e12]
    exact = PowerLaw.of(compute, [7 * c**-0.08 for c in compute], [1] * 4)
    assert exact.scale == pytest.approx(7) and exact.exponent == pytest.approx(0.08)
    assert exact.exponent_error == pytest.approx(0, abs=1e-12)
    # Off by +d, -d, -d, +d in logarithms: the slope stays, and its error is known.
    signs = (1, -1, -1, 1)
    off = [7 * c**-0.08 * math.exp(0.01 * s) for c, s in zip(compute, signs, strict=True)]
    law = PowerLaw.of(compute, off, [1] * 4)
    square = sum(((i - 1.5) * math.log(10)) ** 2 for i in range(4))
    assert law.exponent == pytest.approx(0.08)
    assert law.exponent_error == pytest.approx(math.sqrt(4 * 0.01**2 / 2 / square))
    assert law.centre == pytest.approx(math.sqrt(compute[0] * compute[-1]))
    # In the middle of n points, d off by one in logarithms each, the mean is known to d / sqrt(n).
    middle, error = law.compute_for(law.at(law.centre))
    assert middle == pytest.approx(law.centre)
    assert error == pytest.approx(law.scatter / 2 / law.exponent)
    assert law.compute_for(law.at(compute[-1] * 2)) is None
    # A seed that is better by a third has the same law, as well known but for one more unknown.
    both = PowerLaw.of(compute * 2, [*off, *(y / 1.5 for y in off)], [1] * 4 + [2] * 4)
    assert both.exponent == pytest.approx(0.08) and both.scale == pytest.approx(7 / 1.5**0.5)
    assert both.exponent_error == pytest.approx(math.sqrt(8 * 0.01**2 / 5 / (2 * square)))
    assert both.of_seeds == pytest.approx({1: 1.5**0.5, 2: 1.5**-0.5})
    # A law with a tenth less loss, by 0.01 more and less with these seeds: a seed's own is in both.
    compute_of_less = [*(y * 0.91 for y in off), *(y / 1.5 * 0.89 for y in off)]
    less = PowerLaw.of(compute * 2, compute_of_less, [1] * 4 + [2] * 4)
    times = less.compute_beside(both, both.at(both.centre))
    assert math.exp(times.mean) == pytest.approx((0.91 * 0.89) ** (0.5 / less.exponent))
    ratio = math.log(0.91 / 0.89) / less.exponent
    assert times.deviation == pytest.approx(ratio / math.sqrt(2)) and times.count == 2
    assert less.compute_beside(both, both.at(both.lowest / 2)) is None
    assert PowerLaw.of([1e9, 1e9], [3.0, 3.1], [1, 1]) is None
    assert PowerLaw.of([1e9, 1e10], [3.0, 3.1], [1, 2]) is None
    assert PowerLaw.of([1e9, 1e10], [3.0, 2.7], [1, 1]).exponent_error is None
    assert Spread.of([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert Spread.of([5.0]) == (5.0, None, 1)


def made_up(measure: str, values: dict[str, str], seed: int, loss: float, **more) -> dict:
    """A cell as run.py writes it, with this loss at the length of its training."""
    text = {"position_edges": [0, 256, 512], "loss_by_position": [loss + 1, loss]}
    texts = [
        {"context": c, "loss": loss, "perplexity": math.exp(loss + 512 / c), **text}
        for c in (256, 512)
    ]
    tasks = [
        {"task": "copy", "length": 512, "accuracy": loss / 10}
        | {"distance_edges": [0, 256, 512], "accuracy_by_distance": [None, loss / 10]}
    ]
    prompts = [{"prompt": p, "loss": loss - p / 1e3} for p in (64, 128)]
    return {
        **{"experiment": "made_up", "scale": "cpu", "title": "T", "question": "Q?"},
        **{"measure": measure, "equal": "tokens", "complete": True, "seed": seed},
        **{"flags": {"seed": seed}, "stages": [], "data": None, "starts": []},
        **{"corpus": None, "evaluate": {}, "trained_by_commits": ["0ff1ce"]},
        "axes": {axis: ["a", "b"] for axis in values},
        "cell": f"{'-'.join(values.values())}-seed{seed}",
        "values": values,
        **{"seq_length": 512, "parameters": 1000, "tokens": 10**6, "iterations": 10},
        "flops": {"attention": 10**12, "mlp": 3 * 10**12},
        "evaluation": {"texts": texts, "tasks": tasks, "prompts": prompts},
        "seconds": {"training": 50.0, "evaluation": 10.0},
        "machine": {"processor": "P", "processors": 2, "device": None},
        **{"versions": {"torch": "9"}, "commit": "c0ffee", "processes": 1},
        "date": "2026-01-02 03:04",
        **more,
    }


def report_of(folder: Path, cells: list[dict]) -> tuple[dict, str]:
    (folder / "cells").mkdir(parents=True)
    for cell in cells:
        (folder / "cells" / f"{cell['cell']}.json").write_text(json.dumps(cell))
    write_report(folder)
    return json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


AXIS = {"attention": "a"}, {"attention": "b"}


@pytest.mark.parametrize(
    "measure, column, means, line",
    [
        ("perplexity", "perplexity at 512", (math.exp(4.0),) * 2, "loss at position 256"),
        ("prompts", "loss behind 128", (3 - 0.128, 3 - 0.128), "2.872 ± 0.100"),
        ("recall", "copy of 512", (0.3, 0.3), "30.0% ± 1.0%"),
    ],
)
def test_a_report_has_means_and_spreads_over_the_seeds(tmp_path, measure, column, means, line):
    losses = (2.9, 3.0, 3.1)
    cells = [
        made_up(measure, values, seed, loss) for values in AXIS for seed, loss in enumerate(losses)
    ]
    found, text = report_of(tmp_path, cells)
    assert [row["values"]["attention"] for row in found["rows"]] == ["a", "b"]
    for row, mean in zip(found["rows"], means, strict=True):
        assert row["seeds"] == [0, 1, 2] and row["numbers"][column]["count"] == 3
        assert row["numbers"][column]["mean"] == pytest.approx(mean, rel=0.01)
    assert line in text and "| 1.00 M | 4.0 | 25% |" in text and "c0ffee" in text
    assert list(tmp_path.glob("*.png"))


def test_variants_are_compared_by_seed_and_cut_cells_are_said(tmp_path):
    cells = [made_up("ablation", AXIS[0], seed, 3.0 + seed) for seed in (0, 1)]
    cells += [made_up("ablation", AXIS[1], seed, 3.2 + 1.1 * seed) for seed in (0, 1)]
    cut = made_up("ablation", AXIS[1], 2, 9.0, complete=False, iterations_done=4, evaluation=None)
    found, text = report_of(tmp_path, [*cells, cut])
    [beside] = found["beside_the_first"]["rows"]
    assert beside["values"] == AXIS[1] and beside["numbers"]["loss"] == {
        **{"mean": pytest.approx(0.25), "deviation": pytest.approx(0.1 / math.sqrt(2))},
        "count": 2,
    }
    assert "+0.2500 ± 0.0707" in text and "- b-seed2: 4 of 10 iterations" in text


def test_a_seed_that_is_not_of_the_report_is_compared_with_it(tmp_path):
    cells = [made_up("compute", AXIS[0], seed, 3.0 + seed / 10) for seed in (1, 2, 3)]
    cells += [made_up("compute", AXIS[1], seed, 3.2 + seed / 9.9) for seed in (1, 2, 3)]
    report_of(tmp_path, cells)
    (tmp_path / "another_seed").mkdir()
    # Of a the mean is 3.2 ± 0.1: 95% of new seeds within 4.303 · 0.1 · √(4/3), which is 0.497.
    for values, loss in ((AXIS[0], 3.69), (AXIS[1], 3.8)):
        cell = made_up("compute", values, 4, loss)
        (tmp_path / "another_seed" / f"{cell['cell']}.json").write_text(json.dumps(cell))
    text = write_check(tmp_path, 4)
    assert text == (tmp_path / "another_seed.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| a-", "| b-"))]
    assert lines[0] == (
        "| a-seed4 | loss | 3.6900 | 3.2000 ± 0.1000 (3) | 2.7031 to 3.6969 | yes |"
    )
    assert "b-seed4 | loss | 3.8000" in lines[1] and lines[1].endswith("yes |")
    # Differences of the others: 0.2010, 0.2020, 0.2030.
    assert "loss, minus that of a | +0.1100 | +0.2020 ± 0.0010 (3)" in lines[2]
    assert lines[2].endswith("no |") and "2 of 3 numbers" in text
    with pytest.raises(UserError, match="no cell of seed 5 has two"):
        write_check(tmp_path, 5)
    # What was trained otherwise is not compared, and that is said.
    other = made_up("compute", AXIS[1], 4, 3.8) | {"iterations": 5}
    (tmp_path / "another_seed" / f"{other['cell']}.json").write_text(json.dumps(other))
    text = write_check(tmp_path, 4)
    assert "1 of 1 numbers" in text and "not here: b-seed4" in text and "| b-" not in text
    check_others(tmp_path, [AXIS[0]], seed=4, corpus=None)
    with pytest.raises(UserError, match="another corpus"):
        check_others(tmp_path, [AXIS[0]], seed=4, corpus="0ff1ce")
    with pytest.raises(UserError, match=r"--check-seed 1: .* has that seed"):
        check_others(tmp_path, [AXIS[0]], seed=1, corpus=None)
    with pytest.raises(UserError, match="has not two of these cells"):
        check_others(tmp_path / "none", [AXIS[0]], seed=4, corpus=None)


def test_cells_of_a_grid_that_has_changed_are_in_no_mean(tmp_path):
    cells = [made_up("compute", AXIS[0], seed, 3.0 + seed) for seed in (0, 1, 2)]
    cells[0] |= {"iterations": 5, "date": "2026-01-01 00:00"}
    gone = made_up("compute", {"attention": "c"}, 3, 9.0) | {"date": "2026-01-01 00:00"}
    gone |= {"axes": {"attention": ["a", "b", "c"]}}
    others = made_up("compute", {"size": "a"}, 4, 9.0) | {"date": "2026-01-01 00:00"}
    found, text = report_of(tmp_path, [*cells, gone, others])
    assert found["rows"][0]["seeds"] == [1, 2] and len(found["rows"]) == 1
    assert "in no mean: a-seed0, a-seed4, c-seed3." in text


def test_cells_of_a_grid_that_has_more_values_by_now_stay_in_the_report(tmp_path):
    before = {"axes": {"attention": ["b"]}, "date": "2026-01-01 00:00"}
    cells = [made_up("compute", AXIS[1], seed, 3.0) | before for seed in (1, 2)]
    cells += [made_up("compute", AXIS[0], seed, 2.0) for seed in (1, 2)]
    found, text = report_of(tmp_path, cells)
    assert [row["values"]["attention"] for row in found["rows"]] == ["a", "b"]
    assert "in no mean" not in text and "+1.0000" in text


def test_the_report_of_compute_has_the_power_law_of_each_kind(tmp_path):
    cells = [
        made_up("compute", {"attention": kind, "size": size}, seed, 9 * flops**-exponent)
        | {"flops": {"attention": 0, "mlp": flops}}
        for kind, exponent in (("a", 0.05), ("b", 0.1))
        for size, flops in (("a", 1e12), ("b", 1e13))
        for seed in (0, 1)
    ]
    found, text = report_of(tmp_path, cells)
    assert found["fits"][""]["a"]["exponent"] == pytest.approx(0.05)
    assert found["fits"][""]["b"]["exponent"] == pytest.approx(0.1)
    assert "\nb: loss = 9 · FLOP^-0.1000, with the mean of the seeds' scales, exponent ±" in text
    # a's lowest loss is that of 1e13; b would have it for 1e13 ** 0.5, which was not measured.
    flops = found["at_equal_loss"][""]["flops"]
    assert flops["a"] == [pytest.approx(1e13), pytest.approx(0, abs=1e-9)] and flops["b"] is None
    assert "a 10.00 TFLOP" in text and "b less than 1.00 TFLOP, the least measured" in text


def test_flops_of_an_equal_loss_are_told_where_points_lie_beside_their_law(tmp_path):
    # Of b the last point of three lies below its line, so that the law never says what it has.
    losses = {
        ("a", "c"): ((1e12, 4.0), (3e12, 3.6), (1e13, 3.2)),
        ("b", "c"): ((1e12, 4.2), (3e12, 3.95), (1e13, 3.5)),
        ("a", "d"): ((1e12, 5.0), (3e12, 4.6), (1e13, 4.2)),
        ("b", "d"): ((1e12, 5.2), (3e12, 4.95), (1e13, 4.5)),
    }
    cells = [
        made_up("compute", {"run": run, "attention": kind, "size": str(size)}, seed, loss * luck)
        | {"flops": {"attention": 0, "mlp": flops}}
        | {"axes": {"run": ["a", "b"], "attention": ["c", "d"], "size": ["0", "1", "2"]}}
        for (run, kind), points in losses.items()
        for size, (flops, loss) in enumerate(points)
        for seed, luck in ((1, 1.0), (2, 0.9 if run == "a" else 0.9 * 1.001))
    ]
    found, text = report_of(tmp_path, cells)
    assert list(found["fits"]) == list(found["at_equal_loss"]) == ["c", "d"]
    for name, of_name in found["at_equal_loss"].items():
        flops = {kind: value for kind, (value, _) in of_name["flops"].items()}
        assert flops["b"] == pytest.approx(1e13) and 1e12 < flops["a"] < 1e13
        mean, deviation = of_name["times"]["b"]
        # A luck of a tenth that both have is in neither; b's own of a thousandth is.
        exponent = found["fits"][name]["b"]["exponent"]
        assert math.log1p(deviation) == pytest.approx(
            math.log(1.001) / exponent / math.sqrt(2), rel=1e-6
        )
        assert mean == pytest.approx(flops["b"] / flops["a"], rel=1e-6)
    assert "b, d: loss = " in text and "d: For a loss of " in text
    assert "b: 1." in text or "b: 2." in text
