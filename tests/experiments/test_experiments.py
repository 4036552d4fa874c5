"""examples/experiments/run.py: grids, what cells cost; with `long`, a tiny grid that is
killed."""

import copy
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megalong.evals.trials import Trials, language_of
from megalong.utils.errors import UserError
from tests.launching import REPOSITORY, run, run_here

FOLDER = REPOSITORY / "examples" / "experiments"
SCRIPT = FOLDER / "run.py"
sys.path.insert(0, str(FOLDER))
import commands  # noqa: E402
from cost import cost_of  # noqa: E402
from grid import Cell, as_flags, read_grid  # noqa: E402
from run import training_of  # noqa: E402

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
    with pytest.raises(UserError, match="sparse: no cell has that; there are attention dense, dil"):
        grid.chosen(["sparse"])
    words = as_flags({"swiglu": False, "attention": ["local", "dense"], "finetune": True, "lr": 1})
    assert " ".join(words) == "--no-swiglu --attention local dense --finetune --lr 1"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mesure": 1}, "mesure: no such key; did you mean measure?"),
        ({"equal": "time"}, "equal: time: must be one of tokens, flops"),
        ({"measure": "recal"}, "measure: recal: must be one of .*recall; did you mean recall?"),
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


def test_what_is_there_to_do_is_said_and_mistakes_are_refused(tiny, tmp_path):
    planned = run_here(SCRIPT, tiny, "--output", tmp_path / "out", "--plan").stdout
    assert "tiny: 4 cells, 4 to be run, and 2 trainings that they start from," in planned
    assert "at most 3 minutes each: 18:00 at the most, added up; 2 at a time" in planned
    assert "dense-seed1: " in planned and "iterations" in planned
    assert "4 trainings in all, 0.08 TFLOP" in planned
    assert "those to be run start from 2 trainings, " in planned  # one of each seed
    assert not (tmp_path / "out").exists()
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(tiny.read_text().replace("task_lengths", "task_lenghts"))
    corpus = {"held_out": {"documents": {"linux": 2}}}
    for name, text in (
        *(("corpus.json", json.dumps(corpus)), ("held_out.jsonl", "{}\n")),
        *(("tokenizer.model", ""), ("train_text_document.idx", "")),
    ):
        (tmp_path / "cut" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cut" / name).write_text(text)
    for words, message in (
        (["perplexity", "--corpus", tmp_path / "cut"], "has 1 document, and corpus.json says 2"),
        (["perplexty"], "perplexty: no such experiment; did you mean perplexity?"),
        (["perplexity"], "--corpus is missing"),
        (["perplexity", "--corpus", tmp_path], "no corpus.json: make it with corpus.sh"),
        ([tiny, "--scale", "gpu"], "--scale gpu: tiny.yaml has cpu"),
        (
            [misspelt],
            "cell dense-seed1: evaluate: unrecognized argument: --task-lenghts; did you mean",
        ),
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
