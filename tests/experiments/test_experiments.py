"""examples/experiments/run.py: grids, what cells cost, reports; with `long`, a tiny grid that is
killed."""

import copy
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megalong.errors import UserError
from megalong.tasks.trials import Trials, language_of
from tests.launching import REPOSITORY, run, run_here

FOLDER = REPOSITORY / "examples" / "experiments"
SCRIPT = FOLDER / "run.py"
sys.path.insert(0, str(FOLDER))
import commands  # noqa: E402
from another_seed import check_others, write_check  # noqa: E402
from cost import cost_of  # noqa: E402
from grid import Cell, as_flags, read_grid  # noqa: E402
from report import write_report  # noqa: E402
from run import training_of  # noqa: E402
from statistics_of_seeds import PowerLaw, Spread  # noqa: E402

GRIDS = sorted(FOLDER.glob("*.yaml"))
TINY = {
    "title": "Tiny",
    "question": "Does it run?",
    "measure": "recall",
    "equal": "flops",
    "common": {
        "tokenizer_type": "ByteTokenizer",
        "data": {"task_style": "ids", "tokenizer_type": "ByteTokenizer"},
        "evaluate": {"tasks": ["copy"], "task_style": "ids", "task_lengths": [64]},
        "memory_path": "off",
        "budget": 2.0e10,
    },
    "axes": {"attention": {"dense": {"attention": "dense"}, "dilated": {}}},
    "scales": {
        "cpu": {
            "seeds": [1, 2],
            "minutes": 3,
            "common": {
                **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
                **{"seq_length": 64, "global_batch_size": 4, "micro_batch_size": 4},
                **{"segment_lengths": [16, 64], "dilation_rates": [1, 4]},
                **{
                    "precision": "fp32",
                    "lr": 1e-3,
                    "data": {"lengths": {32: ["mqar"], 64: ["copy"]}},
                },
                "start": {"attention": "dense", "budget": 8192, "lr": 2e-3},
            },
        }
    },
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


def trainings_of(cell: Cell) -> list[Cell]:
    """What it starts from, and itself."""
    return [*(trainings_of(cell.start) if cell.start else []), cell]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_the_cells_of_every_grid_can_be_trained_and_cost_what_they_should(path, scale):
    grid = read_grid(path, scale)
    assert len({cell.name for cell in grid.cells}) == len(grid.cells)
    assert len({cell.seed for cell in grid.cells}) >= 3
    for cell in grid.cells:
        if cell.seed != grid.cells[0].seed:
            continue  # costs the same
        assert cell.name and set(cell.values) == set(grid.axes)
        for training in trainings_of(cell):
            equal = grid.equal if training is cell else "tokens"
            costs_its_budget(training, equal, 2048 if scale == "cpu" else 32000)
            if training.data is not None:
                has_samples(training)


def costs_its_budget(cell: Cell, equal: str, vocab_size: int) -> None:
    cost = cost_of(cell, equal, vocab_size, 1)
    paid = cost.tokens if equal == "tokens" else cost.total_flops
    stages = cell.stages or ({},)
    assert abs(paid - cell.budget) <= 0.51 * len(stages) * paid / cost.iterations
    for iterations, stage in zip(cost.stages or (cost.iterations,), stages, strict=True):
        assert iterations > 2 * {**cell.flags, **stage}["lr_warmup_iters"]


def has_samples(cell: Cell) -> None:
    language = language_of("ids", lambda text: [], range(256), 256)
    lengths = dict(cell.data["lengths"])
    assert sum(lengths) and all(max(lengths) % length == 0 for length in lengths)
    lengths |= {n: cell.evaluate["tasks"] for n in cell.evaluate.get("task_lengths", [])}
    for length, tasks in lengths.items():
        for task in tasks:
            Trials(task, language, length, 4).check("tasks", "lengths")


def test_a_training_in_stages_costs_what_they_do(tmp_path):
    path = tmp_path / "staged.yaml"
    grid = copy.deepcopy(TINY)
    here = grid["scales"]["cpu"]["common"]
    seq_length = here.pop("seq_length")
    here["start"]["seq_length"] = seq_length
    here["stages"] = [
        {"name": "short", "share": 0.25, "seq_length": 32},
        {"name": "long", "share": 0.75, "seq_length": seq_length},
    ]
    path.write_text(yaml.safe_dump(grid, sort_keys=False))
    cell = replace(read_grid(path, "cpu").cells[0], budget=51200.0)
    whole = cost_of(cell, "tokens", 257, 1)
    assert cell.start.stages == () and cost_of(cell.start, "tokens", 257, 1).tokens == 8192
    assert whole.stages == (100, 150) and whole.iterations == 250 and whole.tokens == 51200
    parts = [
        cost_of(
            replace(cell, budget=b, stages=(), flags={**cell.flags, "seq_length": n}),
            *("tokens", 257, 1),
        )
        for b, n in ((12800.0, 32), (38400.0, 64))
    ]
    assert whole.flops == {part: sum(cost.flops[part] for cost in parts) for part in parts[0].flops}


def test_a_start_that_fails_is_tried_once(tiny, tmp_path, monkeypatch):
    tried = []

    def fails(command, environment, log, seconds, on_tick):
        tried.append(command)
        raise UserError("it fails")
        yield

    monkeypatch.setattr(commands, "run_command", fails)
    place = commands.Place(None, tmp_path / "models", 1, 60.0, {})
    for cell in read_grid(tiny, "cpu", [1]).cells:  # dense and dilated, of one start
        training = training_of(cell, "flops", place)
        with pytest.raises(UserError, match="it fails"):
            list(training.go_on({}))
    assert len(tried) == 1


def test_starts_read_other_texts_than_what_follows():
    [cell, *_] = read_grid(FOLDER / "perplexity.yaml", "cpu").cells
    of_text, of_recall = cell.start, cell.start.start
    assert cell.data is of_text.data is None and of_recall.data is not None
    assert of_text.flags["seed"] != cell.flags["seed"]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_position_is_in_every_branch_but_where_that_is_asked(path, scale):
    for cell in read_grid(path, scale).cells:
        rates = [
            rate
            for settings in (cell.flags, *cell.stages)
            for rate in settings.get("dilation_rates", ())
        ]
        if not cell.values.get("pattern", "").startswith("rate-"):
            assert max(rates) <= cell.flags["num_attention_heads"], cell.name


def test_prompts_are_asked_of_the_trainings_of_perplexity():
    for scale in ("cpu", "gpu"):
        trained = {
            json.dumps(cell.flags, sort_keys=True)
            for cell in read_grid(FOLDER / "perplexity.yaml", scale).cells
        }
        for cell in read_grid(FOLDER / "prompt.yaml", scale).cells:
            assert json.dumps(cell.flags, sort_keys=True) in trained


def test_settings_of_layers(tiny):
    grid = read_grid(tiny, "cpu")
    assert [cell.name for cell in grid.cells] == [
        *("dense-seed1", "dense-seed2", "dilated-seed1", "dilated-seed2")
    ]
    assert grid.cells[0].data == {
        **TINY["common"]["data"],
        "lengths": {32: ["mqar"], 64: ["copy"]},
    }
    assert grid.cells[1].flags["seed"] == 2 and "budget" not in grid.cells[1].flags
    dense, _, dilated, _ = grid.cells
    assert dilated.start == replace(dense.start, name=dilated.start.name, values=dilated.values)
    assert dense.start.flags == {**dense.flags, "lr": 2e-3} and dense.start.budget == 8192
    assert dense.start.data == dense.data and dense.start.start is None
    assert [cell.name for cell in grid.chosen(["dilated"])] == ["dilated-seed1", "dilated-seed2"]
    of_others = read_grid(tiny, "cpu", [2, 7]).cells
    assert [cell.name for cell in of_others[:2]] == ["dense-seed2", "dense-seed7"]
    assert of_others[0] == grid.cells[1] and of_others[1].flags["seed"] == 7
    with pytest.raises(UserError, match="--cells sparse: no cell has that; there are dense"):
        grid.chosen(["sparse"])
    words = as_flags({"swiglu": False, "attention": ["local", "dense"], "finetune": True, "lr": 1})
    assert " ".join(words) == "--no-swiglu --attention local dense --finetune --lr 1"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesure": 1}, "mesure: no such key; did you mean measure?"),
        ({"equal": "time"}, "equal: time: must be one of tokens, flops"),
        ({"scales": {"gpu": {}}}, "--scale cpu: tiny.yaml has gpu"),
        ({"common": {}}, "evaluate: cell dense-seed1 has none"),
        ({"common": TINY["common"] | {"strat": {}}}, "strat: no such setting; did you mean start?"),
        ({"common": TINY["common"] | {"stages": {"a": 1}}}, "stages: dense-seed1 has stages: give"),
        (
            {"common": TINY["common"] | {"stages": [{"name": "a"}]}},
            "stages: dense-seed1: each needs a share above 0, which sum to 1",
        ),
        (
            {"common": TINY["common"] | {"start": {"evaluate": {}}}},
            "evaluate: dense-seed1 starts from what is not evaluated",
        ),
    ],
)
def test_wrong_grids_are_refused(tmp_path, changes, message):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        read_grid(path, "cpu")


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
    assert "loss, less that of a | +0.1100 | +0.2020 ± 0.0010 (3)" in lines[2]
    assert lines[2].endswith("no |") and "2 of 3 numbers" in text
    with pytest.raises(UserError, match="no cell of seed 5 has two"):
        write_check(tmp_path, 5)
    # What was trained otherwise is not compared, and that is said.
    other = made_up("compute", AXIS[1], 4, 3.8) | {"iterations": 5}
    (tmp_path / "another_seed" / f"{other['cell']}.json").write_text(json.dumps(other))
    text = write_check(tmp_path, 4)
    assert "1 of 1 numbers" in text and "not here: b-seed4" in text and "| b-" not in text
    check_others(tmp_path, [AXIS[0]])
    with pytest.raises(UserError, match="has not two of these cells"):
        check_others(tmp_path / "none", [AXIS[0]])


def test_cells_of_a_grid_that_has_changed_are_in_no_mean(tmp_path):
    cells = [made_up("compute", AXIS[0], seed, 3.0 + seed) for seed in (0, 1, 2)]
    cells[0] |= {"iterations": 5, "date": "2026-01-01 00:00"}
    gone = made_up("compute", AXIS[1], 3, 9.0) | {"date": "2026-01-01 00:00"}
    found, text = report_of(tmp_path, [*cells, gone | {"axes": {"attention": ["a", "b", "c"]}}])
    assert found["rows"][0]["seeds"] == [1, 2] and len(found["rows"]) == 1
    assert "in no mean: a-seed0, b-seed3." in text


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


def test_what_is_there_to_do_is_said_and_mistakes_are_refused(tiny, tmp_path):
    planned = run_here(SCRIPT, tiny, "--output", tmp_path / "out", "--plan").stdout
    assert "tiny: 4 cells, 4 to be run, and 2 trainings that they start from," in planned
    assert "at most 3 minutes each: 18:00 at the very most" in planned
    assert "dense-seed1: " in planned and "iterations" in planned
    assert "they start from 2 trainings, " in planned  # one of each seed
    assert not (tmp_path / "out").exists()
    for words, message in (
        (["perplexty"], "perplexty: no such experiment; did you mean perplexity?"),
        (["perplexity"], "--corpus is missing"),
        (["perplexity", "--corpus", tmp_path], "no corpus.json: make it with corpus.sh"),
        ([tiny, "--scale", "gpu"], "--scale gpu: tiny.yaml has cpu"),
    ):
        refused = run_here(SCRIPT, *words, "--output", tmp_path / "out", check=False)
        assert refused.returncode == 2 and message in refused.stderr


@pytest.mark.long
def test_a_grid_that_is_killed_goes_on_and_its_report_is_of_its_cells_alone(tiny, tmp_path):
    output = tmp_path / "out"
    flags = [str(SCRIPT), str(tiny), "--output", str(output), "--seeds", "1", "--jobs", "1"]
    command = [sys.executable, *flags]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = output / "tiny_cpu" / "cells" / "dense-seed1.json"
    wait_for(lambda: first.exists() or started.poll() is not None)
    made = first.stat().st_mtime_ns
    # In the training of the second cell, behind a checkpoint.
    wait_for(lambda: len(list(output.glob("models/*/run/latest"))) == 3)
    started.send_signal(signal.SIGKILL)
    started.wait()
    [second] = [path.parent for path in output.glob("models/*/run") if not _done(path.parent)]
    run([*command, "--cells", "dilated"])
    assert first.stat().st_mtime_ns == made and _done(second)
    assert "stopped by" in (second / "log.txt").read_text()
    cells = sorted(path.name for path in (output / "tiny_cpu" / "cells").glob("*.json"))
    assert cells == ["dense-seed1.json", "dilated-seed1.json"]
    result = json.loads((output / "tiny_cpu" / "cells" / cells[1]).read_text())
    assert result["complete"] and result["iterations_done"] == result["iterations"]
    assert result["seconds"]["training"] > 1 and len(result["commands"]) == 7
    assert str(tmp_path) not in json.dumps(result) and str(REPOSITORY) not in json.dumps(result)
    report = (output / "tiny_cpu" / "report.md").read_text()
    assert "copy of 64" in report and "All rows of a seed start from the same weights" in report
    assert len(list(output.glob("models/*/done"))) == 3  # the start is that of both
    (output / "tiny_cpu" / "report.md").unlink()
    run([*command, "--report"])
    assert (output / "tiny_cpu" / "report.md").read_text() == report


@pytest.mark.long
def test_a_cell_is_cut_at_its_minutes_and_goes_on_with_more(tiny, tmp_path):
    flags = ["--output", tmp_path / "out", "--seeds", 1, "--cells", "dense"]
    command = [sys.executable, str(SCRIPT), str(tiny), *map(str, flags)]
    cut = run([*command, "--minutes", "0.05"], check=False)
    assert "seed1 was cut, the training is at" in cut.stderr and "no cell is complete" in cut.stderr
    assert "0 to be run" in run([*command, "--minutes", "0.05"], check=False).stdout
    assert "copy of 64" in run([*command, "--minutes", "3"]).stdout


def _done(model: Path) -> bool:
    return (model / "done").exists()


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
