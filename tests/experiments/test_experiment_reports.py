"""Reports of examples/experiments: the committed ones, and of cells that are made up."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest

from megalong.utils.errors import UserError
from tests.launching import REPOSITORY

FOLDER = REPOSITORY / "examples" / "experiments"
sys.path.insert(0, str(FOLDER))
from grid import Grid, read_grid  # noqa: E402
from report import check_others, write_check, write_report  # noqa: E402
from statistics_of_seeds import PowerLaw, Spread  # noqa: E402
from table import table_of  # noqa: E402

RESULTS = sorted(path.parent for path in (FOLDER / "results").glob("*/cells.csv"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_the_committed_cells(tmp_path: Path, folder: Path):
    here = tmp_path / folder.name
    here.mkdir()
    shutil.copy(folder / "cells.csv", here)
    grid = read_grid(FOLDER / f"{folder.name.removesuffix('_cpu')}.yaml", "cpu")
    write_report(here, grid)
    write_check(here, grid, 4)
    assert sorted(path.name for path in here.iterdir()) == sorted(p.name for p in folder.iterdir())
    for name in ("report.md", "another_seed.md"):
        assert (here / name).read_text() == (folder / name).read_text(), name
    in_docs = (REPOSITORY / "docs" / "results.md").read_text()
    parts = (folder / "report.md").read_text().split("\n\n")
    tables = [part.strip("\n") for part in parts if part[:1] == "|"]
    assert tables and not [table for table in tables if table not in in_docs]
    assert all(f"{folder.name}/{path.name}" in in_docs for path in folder.glob("*.png"))
    for row in table_of(folder):
        commits = row["commits"].split()
        assert len(commits) > 1 and not [name for name in commits if name[-1] == "+"]
        assert not row["cut"] and row["date"] and "/" not in row["flags"]


def test_a_power_law_is_found_with_its_error():
    compute = [1e9, 1e10, 1e11, 1e12]
    # Off by +d, -d, -d, +d in logarithms: the slope stays, and its error is known.
    signs = (1, -1, -1, 1)
    off = [7 * c**-0.08 * math.exp(0.01 * s) for c, s in zip(compute, signs, strict=True)]
    law = PowerLaw.of(compute, off, [1] * 4)
    square = sum(((i - 1.5) * math.log(10)) ** 2 for i in range(4))
    assert law.exponent == pytest.approx(0.08) and law.scale == pytest.approx(7)
    assert law.exponent_error == pytest.approx(math.sqrt(4 * 0.01**2 / 2 / square))
    # In the middle of n points, d off by one in logarithms each, the mean is known to d / sqrt(n).
    middle, error = law.compute_for(law.at(law.centre))
    assert middle == pytest.approx(law.centre)
    assert error == pytest.approx(law.scatter / 2 / law.exponent)
    assert law.compute_for(law.at(compute[-1] * 2)) is None
    # A seed that is better by a third has the same law, as well known but for one more unknown.
    both = PowerLaw.of(compute * 2, [*off, *(y / 1.5 for y in off)], [1] * 4 + [2] * 4)
    assert both.exponent_error == pytest.approx(math.sqrt(8 * 0.01**2 / 5 / (2 * square)))
    assert both.of_seeds == pytest.approx({1: 1.5**0.5, 2: 1.5**-0.5})
    # A law with a tenth less loss, by 0.01 more and less with these seeds: a seed's own is in both.
    compute_of_less = [*(y * 0.91 for y in off), *(y / 1.5 * 0.89 for y in off)]
    less = PowerLaw.of(compute * 2, compute_of_less, [1] * 4 + [2] * 4)
    times = less.compute_beside(both, both.at(both.centre))
    assert math.exp(times.mean) == pytest.approx((0.91 * 0.89) ** (0.5 / less.exponent))
    ratio = math.log(0.91 / 0.89) / less.exponent
    assert times.deviation == pytest.approx(ratio / math.sqrt(2)) and times.count == 2
    assert PowerLaw.of([1e9, 1e10], [3.0, 3.1], [1, 2]) is None
    assert Spread.of([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)), 2)
    assert Spread.of([5.0]) == (5.0, None, 1)


A, B = {"attention": "a"}, {"attention": "b"}


def grid_of(measure: str, **axes: list[str]) -> Grid:
    axes = axes or {"attention": ["a", "b"]}
    return Grid("made_up", "cpu", "T", "Q?", measure, "tokens", axes, 10, [])


def made_up(measure: str, values: dict[str, str], seed: int, loss: float, **more) -> dict:
    """A cell as run.py writes it, with this loss at the length of its training."""
    text = {"position_edges": [0, 256, 512], "loss_by_position": [loss + 1, loss]}
    tasks = [
        {"task": "copy", "length": 512, "accuracy": loss / 10}
        | {"distance_edges": [0, 256, 512], "accuracy_by_distance": [None, loss / 10]}
    ]
    texts = [{"context": c, "loss": loss, **text} for c in (256, 512)]
    prompts = [{"prompt": p, "loss": loss - p / 1e3} for p in (64, 128)]
    return {
        **{"measure": measure, "complete": True, "seed": seed, "values": values},
        **{"flags": {"seed": seed}, "stages": [], "data": None, "starts": []},
        **{"corpus": None, "evaluate": {}, "trained_by_commits": ["0ff1ce"], "commit": "c0ffee"},
        "cell": f"{'-'.join(values.values())}-seed{seed}",
        **{"seq_length": 512, "parameters": 1000, "tokens": 10**6, "iterations": 10},
        "flops": {"attention": 10**12, "mlp": 3 * 10**12},
        "evaluation": {"texts": texts, "tasks": tasks, "prompts": prompts},
        "seconds": {"training": 50.0, "evaluation": 10.0},
        "machine": {"processor": "P", "processors": 2, "device": None},
        **{"versions": {"torch": "9"}, "processes": 1, "date": "2026-01-02 03:04"},
        **more,
    }


def write_cells(folder: Path, cells: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        (folder / f"{cell['cell']}.json").write_text(json.dumps(cell))


def report_of(folder: Path, cells: list[dict], grid: Grid) -> str:
    write_cells(folder / "cells", cells)
    write_report(folder, grid)
    text = (folder / "report.md").read_text()
    shutil.rmtree(folder / "cells")
    write_report(folder, grid)  # of the CSV alone
    assert (folder / "report.md").read_text() == text and list(folder.glob("*.png"))
    return text


@pytest.mark.parametrize(
    "measure, cells, compared",
    [
        ("perplexity", ["| 3.000 ± 0.100 | 3.000", "loss at position 256"], 2),
        ("prompts", ["2.872 ± 0.100", "loss behind 128"], 2),
        ("recall", ["30.0% ± 1.0%", "copy of 512"], 1),
    ],
)
def test_a_report_has_means_and_spreads_over_the_seeds(tmp_path, measure, cells, compared):
    losses = enumerate((2.9, 3.0, 3.1))
    made = [made_up(measure, v, seed, loss) for seed, loss in losses for v in (A, B)]
    text = report_of(tmp_path, made, grid_of(measure))
    assert all(cell in text for cell in cells) and text.count("\n|---|") == compared
    assert "| 1.00 M | 4.0 | 25% |" in text and "c0ffee" in text and "6:00 in all" in text


def test_variants_are_compared_by_seed_and_cut_cells_are_said(tmp_path):
    cells = [made_up("ablation", A, seed, 3.0 + seed) for seed in (0, 1)]
    cells += [made_up("ablation", B, seed, 3.2 + 1.1 * seed) for seed in (0, 1)]
    cut = made_up("ablation", B, 2, 9.0, complete=False, iterations_done=4, evaluation=None)
    text = report_of(tmp_path, [*cells, cut], grid_of("ablation"))
    assert "| b | +0.2500 ± 0.0707 | 2 |" in text and "- b-seed2: 4 of 10 iterations" in text


def test_a_seed_that_is_not_of_the_report_is_compared_with_it(tmp_path):
    grid = grid_of("compute")
    cells = [made_up("compute", A, seed, 3.0 + seed / 10) for seed in (1, 2, 3)]
    cells += [made_up("compute", B, seed, 3.2 + seed / 9.9) for seed in (1, 2, 3)]
    report_of(tmp_path, cells, grid)
    # Of a the mean is 3.2 ± 0.1: 95% of new seeds within 4.303 · 0.1 · √(4/3), which is 0.497.
    new = [made_up("compute", values, 4, loss) for values, loss in ((A, 3.69), (B, 3.8))]
    write_cells(tmp_path / "another_seed", new)
    text = write_check(tmp_path, grid, 4)
    lines = [line for line in text.splitlines() if line.startswith(("| a-", "| b-"))]
    assert lines[0] == (
        "| a-seed4 | loss | 3.6900 | 3.2000 ± 0.1000 (3) | 2.7031 to 3.6969 | yes |"
    )
    # Differences of the others: 0.2010, 0.2020, 0.2030.
    assert "loss, minus that of a | +0.1100 | +0.2020 ± 0.0010 (3)" in lines[2]
    assert lines[2].endswith("no |") and "2 of 3 numbers" in text
    write_cells(tmp_path / "another_seed", [new[1] | {"iterations": 5}])
    text = write_check(tmp_path, grid, 4)
    assert "1 of 1 numbers" in text and "not here: b-seed4" in text and "| b-" not in text
    check_others(tmp_path, [A], seed=4, corpus=None)
    for folder, seed, corpus, message in (
        (tmp_path, 4, "0ff1ce", "another corpus"),
        (tmp_path, 1, None, "--check-seed 1"),
        (tmp_path / "none", 4, None, "has not two of these cells"),
    ):
        with pytest.raises(UserError, match=message):
            check_others(folder, [A], seed, corpus)
    with pytest.raises(UserError, match="no cell of seed 5 has two"):
        write_check(tmp_path, grid, 5)


def test_cells_of_a_grid_that_has_changed_are_in_no_mean(tmp_path):
    cells = [made_up("compute", A, seed, 3.0 + seed) for seed in (0, 1, 2)]
    cells[0] |= {"iterations": 5, "date": "2026-01-01 00:00"}
    cells += [made_up("compute", {"attention": "c"}, 3, 9.0)]
    cells += [made_up("compute", {"size": "a"}, 4, 9.0)]
    text = report_of(tmp_path, cells, grid_of("compute"))
    assert "in no mean: a-seed0, a-seed4, c-seed3." in text and "| 4.5000 ± 0.7071 | 2 |" in text


def test_power_laws_and_the_flops_of_an_equal_loss(tmp_path):
    axes = {"run": ["a", "b"], "attention": ["c", "d"], "size": ["0", "1", "2"]}
    # Of b the last point of three lies below its line, so that the law never says what it has.
    losses = {
        ("a", "c"): ((1e12, 4.0), (3e12, 3.6), (1e13, 3.2)),
        ("b", "c"): ((1e12, 4.2), (3e12, 3.95), (1e13, 3.5)),
        ("a", "d"): ((1e12, 5.0), (3e12, 4.6), (1e13, 4.2)),
        ("b", "d"): ((1e12, 5.2), (3e12, 4.95), (1e13, 4.5)),
    }
    cells = [
        made_up("compute", {"run": run, "attention": kind, "size": str(size)}, seed, loss * luck)
        | {"flops": {"attention": 0, "mlp": int(flops)}}
        for (run, kind), points in losses.items()
        for size, (flops, loss) in enumerate(points)
        # A luck of a tenth that both have is in neither; b's own of a thousandth is.
        for seed, luck in ((1, 1.0), (2, 0.9 if run == "a" else 0.9 * 1.001))
    ]
    text = report_of(tmp_path, cells, grid_of("compute", **axes))
    assert "\nb, d: loss = " in text and "\nd: For a loss of " in text
    assert "b 10.00 TFLOP ±" in text and "its deviation over the seeds." in text
