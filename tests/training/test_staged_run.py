"""Runs of stages: the table, where a run goes on, and what is the same however it was stopped."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from megalong.checkpoint.content import Progress
from megalong.checkpoint.folder import checkpoint_folder, checkpoints, latest
from megalong.checkpoint.reading import CheckpointReader
from megalong.config.recipe import parse_run
from megalong.training import stages as stages_of_run
from megalong.training.metrics import read_metrics, training_records
from megalong.training.resuming import starting_point
from megalong.training.stage_table import print_stages, stage_table
from megalong.training.stages import begun, stages_ahead
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, made_once, run_here
from tests.recipe_file import changed, stages_of, write_recipe
from tests.training.staged_worker import ENDS, RESUMED, STAGES, STOPS, write_settings
from tests.training.test_resume import KILLED_RUN, assert_same_run, numbers


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path)


def at(iteration: int, before: Progress | None = None) -> Progress:
    """How far a run of the file has come after so many iterations."""
    progress = before or Progress()
    for stage in stages_of():
        if stage.begin < iteration:
            progress = begun(progress, stage, stage.config)
    return dataclasses.replace(progress, iteration=iteration)


@pytest.fixture
def ahead(monkeypatch):
    """The names of the stages that a checkpoint of this progress leaves to be done."""

    def names(progress: Progress) -> list[str | None]:
        monkeypatch.setattr(stages_of_run, "found_checkpoint", lambda config: Path("c"))
        monkeypatch.setattr(stages_of_run, "read_progress", lambda checkpoint: progress)
        return [stage.name for stage in stages_ahead(stages_of())]

    return names


@pytest.mark.parametrize(
    "change, flag",
    [
        (("    lr: 5.0e-4", "    lr: 5.0e-4\n    global_batch_size: 8"), "--global-batch-size"),
        (("seq_length: 256", "seq_length: 512"), "--seq-length"),
    ],
)
def test_tokens_are_not_counted_with_two_batches(file, ahead, change, flag):
    begins, within, done = at(10), at(12), at(15)
    changed(file, change)
    assert ahead(begins) == ["short", "long"]
    for progress in (within, done):
        with pytest.raises(UserError, match=rf"stage long: {flag} is .*: set train_iters instead$"):
            ahead(progress)
    changed(file, ("train_tokens: 5e3", "train_iters: 4"))
    assert ahead(within) == ["long"]


def test_settings_of_the_optimizer_stay_once_a_stage_is_done(file, ahead):
    within, done = at(6), at(12)
    changed(file, ("save: run\n", "save: run\nsgd_momentum: 0.5\n"))  # it is Adam
    assert ahead(done) == ["long"]
    for setting, flag in (("adam_beta2: 0.9", "--adam-beta2"), ("precision: fp32", "--precision")):
        changed(file, ("save: run\n", f"save: run\n{setting}\n"))
        assert ahead(within) == ["short", "long"]
        with pytest.raises(UserError, match=rf"stage short: is done .* where {flag} was"):
            ahead(done)
        changed(file, (f"{setting}\n", ""))


def test_the_table_of_the_stages(file):
    recipe = parse_run(["--config", "recipe.yaml", "--dry-run"])
    assert recipe.dry_run == 0 and recipe.fewest_ranks == 2
    assert parse_run(["--config", "recipe.yaml", "--dry-run", "8"]).dry_run == 8
    lines = stage_table(recipe.resolve(2), 257, 2).splitlines()
    head, short, long, *lines = lines
    assert re.split(r"  +", head)[:5] == ["stage", "sequence", "batch", "iterations", "tokens"]
    assert re.split(r"  +", short)[:5] == ["short", "64", "4", "10", "2,560"]
    assert re.split(r"  +", long)[:5] == ["long", "256", "4", "5", "5,120"]
    dilated = "dilated attention, segment length/dilation rate:"
    assert [re.split(r"  +", line) for line in lines[1:11]] == [
        ["attention", "short", f"{dilated} 16/1, 64/2"],
        ["", "long", f"layers dilated dense, and so on: {dilated} 64/1, 256/4; dense attention"],
        ["positions", "short", "rope, rotary_base 10000.0"],
        ["", "long", "rope, rotary_base 50000.0"],
        ["learning rate", "short", f"0.001 to {1e-3 / 8:.2g}, linear, warm-up 2"],
        ["", "long", "0.0005 to 0.00021, WSD, exponential in the last 2"],
        ["data", "short", "corpus"],
        ["", "long", "a, b"],
        ["layout", "short", "sequence 1 x tensor 1 x pipeline 1 x data 2, ZeRO 1, micro batch 2"],
        ["", "long", "sequence 2 x tensor 1 x pipeline 1 x data 1, ZeRO 1, micro batch 2"],
    ]
    total, throughout, *more = lines[12:]
    shares = [float(re.search(r"([\d.]+)%", line)[1]) for line in (short, long)]
    assert sum(shares) == pytest.approx(100, abs=0.11) and shares[1] > 66
    assert total.startswith("15 iterations, 7,680 tokens, ") and total.endswith("on 2 ranks")
    ratio = float(throughout.split()[-4])
    assert ratio == pytest.approx(shares[1] / 100 * 7680 / 5120, rel=0.01)
    assert "train_tokens 5,000 are rounded up" in more[-1]


def test_the_table_needs_no_data_and_says_what_is_odd(file, capsys):
    changed(file, ("data_path: corpus\n", ""), ("    data_blend: blend.yaml\n", ""),
            ("segment_lengths: [64, 256]", "segment_lengths: [64, 512]"),
            ("rotary_base: 50000", "yarn_rotary_scaling_factor: 4\n"
             "      yarn_original_max_position_embeddings: 64"))  # fmt: skip
    with pytest.raises(UserError, match="--data-path is missing"):
        stages_of()
    print_stages(parse_run(["--config", "recipe.yaml", "--dry-run", "2"]))
    told = capsys.readouterr().out
    assert "\ndata           all    (not given)\n" in told
    assert "rope, rotary_base 10000.0, yarn_rotary_scaling_factor 4.0, yarn_original_max" in told
    assert told.endswith(
        "\nstage long: --segment-lengths 512: above --seq-length 256, and so one segment, the whole"
        " sequence\n"
    )
    flags = ("--valid-data-path", "v", "--tokenizer-type", "ByteTokenizer")
    print_stages(parse_run([*flags, "--lr-decay-style", "constant", "--dry-run"]))
    told = capsys.readouterr().out
    assert "\ndata             (not given), valid_data_path v\n" in told
    assert "\nlearning rate    0.0006, constant\n" in told


WORKER = __file__.replace("test_staged_run", "staged_worker")


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        folder.mkdir()
        for ranks in (1, 2):
            done = run_ranks(ranks, WORKER, corpus, folder, timeout=600)
            (folder / f"said_on_{ranks}").write_text(done.stdout)

    return made_once(tmp_path_factory, "staged", make)


def facts(runs: Path) -> dict:
    return json.loads((runs / "facts.json").read_text())


def trained(folder: Path) -> list[dict]:
    return training_records(numbers(folder))


def samples(folder: Path) -> list[dict]:
    return read_metrics(folder / "samples.jsonl")


def test_the_stages_follow_each_other_in_one_folder(runs):
    whole = runs / "whole"
    records = trained(whole)
    assert [r["iteration"] for r in records] == list(range(1, 9))
    assert [r["stage"] for r in records] == ["short"] * 3 + ["middle"] * 3 + ["long"] * 2
    sizes = [8 * 64] * 3 + [4 * 128] * 3 + [8 * 256] * 2
    assert [r["consumed_tokens"] for r in records] == [sum(sizes[:i]) for i in range(1, 9)]
    decayed = 2 * math.sqrt(0.5) - 1
    rates = [1e-2, 1e-2, 5e-3, 4e-3, 4e-3, 4e-3 * decayed, 1e-2, 5e-3]
    assert [r["learning_rate"] for r in records] == pytest.approx(rates)
    # Evaluated within the stages, and on all that is held out at the end of each.
    evaluated = {(r["iteration"], r["split"], r["stage"]) for r in numbers(whole) if "split" in r}
    sets = {"short": [""], "middle": ["/code", "/books"], "long": ["/books", "/new"]}
    expected = {(2, "validation", "short")}
    expected |= {(4, f"validation{name}", "middle") for name in sets["middle"]}
    for stage, end in zip(STAGES, ENDS, strict=True):
        of_stage = [
            f"{part}{name}" for part in ("validation", "test") for name in sets[stage["name"]]
        ]
        expected |= {(end, split, stage["name"]) for split in of_stage}
    assert evaluated == expected
    asked = [(2, "short"), (3, "short"), (4, "middle"), (6, "middle"), (8, "long")]
    of_tasks = [r for r in numbers(whole) if "task" in r]
    for of_stages in (of_tasks, samples(whole)):
        assert [(r["iteration"], r["stage"]) for r in of_stages] == asked
    # --keep-last 1 keeps those of the ends of stages.
    assert [path.name for path in checkpoints(whole)] == [f"iter_{end:07d}" for end in ENDS]
    progress = CheckpointReader(latest(whole)).progress()
    assert [(s["name"], s["begin"]) for s in progress.stages] == [
        ("short", 0), ("middle", 3), ("long", 6),
    ]  # fmt: skip
    assert progress.updates == 8
    # Losses that spikes are measured by are those of the stage.
    assert progress.recent_losses == [r["loss"] for r in records[6:]]
    assert facts(runs)["alive"] == [0, 0, 0]


def test_what_is_said_of_the_stages(runs):
    said = (runs / "said_on_1").read_text()
    whole = said[: said.index("stopped by SIGTERM")]
    for words in (
        "stage short, 1 of 3: iterations 1 to 3, of 8 sequences of 64 tokens",
        "stage middle, 2 of 3: iterations 4 to 6, of 4 sequences of 128 tokens",
        "stage middle: train_tokens 1,531 are rounded up to 1,536, 3 iterations of 512",
        "stage middle begins with ",
        "/whole/iter_0000003\n--attention is dilated dense; the checkpoint was written with",
        "--segment-lengths is 64 256; the checkpoint was written with 32 64 128",
        "from sample 12 on the training data is books 0.5, new 0.5; before it was code 0.7",
        "stage long (3 of 3) | iteration 8/8 | loss",
    ):
        assert words in whole, words
    assert "--train-iters is" not in whole and "the learning rate goes from" not in whole
    assert "stage short is done: evaluating only" in said


def test_a_stopped_run_is_the_same_bit_for_bit(runs):
    for name, (iteration, _) in STOPS.items():
        left = runs / "left" / name
        assert (left / "stopped").exists()
        if iteration:
            assert latest(left).name == f"iter_{iteration:07d}"
        assert_same_run(runs / "stopped" / name, runs / "whole")
        assert samples(runs / "stopped" / name) == samples(runs / "whole")
        assert not (runs / "stopped" / name / "stopped").exists()


def test_a_killed_run_is_the_same_bit_for_bit(runs, corpus, tmp_path):
    folder = tmp_path / "killed"
    settings = {"stages": STAGES, "save": str(folder), "load": str(folder)}
    flags = ("--config", write_settings(tmp_path / "killed.yaml", str(corpus), **settings))
    # Between two stages, while the second checkpoint of a start is written and is put in force,
    # and in the last stage: behind it, the checkpoint in force.
    for point, count, in_force in (("write", 2, 2), ("pointer", 3, 4), ("step", 4, 6)):
        assert run_ranks(1, KILLED_RUN, point, count, *flags, check=False).returncode != 0
        assert latest(folder).name == f"iter_{in_force:07d}", point
    run_ranks(1, PRETRAIN, *flags)
    assert_same_run(folder, runs / "whole")


@pytest.mark.parametrize("name", [*RESUMED, "own_layout"])
def test_in_other_layouts(runs, name):
    folder = runs / "own_layout" if name == "own_layout" else runs / "resumed" / name
    records, wanted = trained(folder), trained(runs / "whole")
    for key in ("iteration", "stage", "learning_rate", "consumed_tokens"):
        assert [r[key] for r in records] == [r[key] for r in wanted], key
    for key in ("loss", "grad_norm"):
        values, expected = ([r[key] for r in part] for part in (records, wanted))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=0, msg=key)
    assert_close_tensors(latest(folder), latest(runs / "whole"))


def assert_close_tensors(checkpoint: Path, wanted: Path) -> None:
    reader, reference = CheckpointReader(checkpoint), CheckpointReader(wanted)
    names = [name for name in reference.tensors if not name.startswith("random.")]
    assert set(names) == {name for name in reader.tensors if not name.startswith("random.")}
    for name in names:
        tensor, expected = reader.read(name), reference.read(name)
        assert (tensor - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_a_stage_is_what_a_run_that_goes_on_is(runs):
    ours, by_hand = CheckpointReader(checkpoint_folder(runs / "whole", 6)), runs / "by_hand" / "2"
    theirs = CheckpointReader(latest(by_hand))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.tensors)
    left_out = {"stage", "skipped_spikes"}
    records = [{k: v for k, v in r.items() if k not in left_out} for r in trained(runs / "whole")]
    assert records[3:6] == [
        {k: v for k, v in r.items() if k not in left_out} for r in trained(by_hand)
    ]


def test_the_first_stage_may_begin_with_another_model(runs):
    said = (runs / "said_on_1").read_text()
    assert "a new run, with the weights of" in said
    records = trained(runs / "pretrained")
    assert [(r["iteration"], r["stage"]) for r in records] == [(1, "short"), (2, "more")]
    assert records[0]["loss"] < trained(runs / "whole")[0]["loss"] - 0.2


def recipe_of(runs: Path, corpus: Path, file: Path, stages: list[dict], left: str) -> Path:
    folder = str(runs / left)
    return write_settings(file, str(corpus), stages=stages, save=folder, load=folder)


def other(number: int, **changes) -> list[dict]:
    return [stage | changes if i == number else stage for i, stage in enumerate(STAGES)]


@pytest.mark.parametrize(
    "left, stages, message",
    [
        ("whole", other(0, lr=5e-3), "stage short: is done in the checkpoint {checkpoint}, where"
         " --lr was 0.01, and here it is 0.005: set it to that again"),
        ("whole", other(0, segment_lengths=[32, 64]), "where --segment-lengths was 16 64, and"),
        ("whole", other(0, train_iters=4), "where --train-iters was 3, and here it is 4"),
        ("left/end_of_short", other(0, seq_length=128), "where --seq-length was 64, and here it is"
         " 128"),
        ("left/in_middle", other(0, data_path=["x={corpus}"]), "where its training data was"
         " code_text_document (1 epochs), and here it is x (1 epochs): set it to that again"),
        ("whole", other(1, name="other"), "stages: none is called middle, and the checkpoint"
         " {checkpoint} has begun it as number 2; here are short, other, long: put it back"),
        ("left/in_middle", [STAGES[1], STAGES[0]], "stage short: is number 2 here, and number 1"),
        ("whole", STAGES[:2], "stages: none is called long"),
        ("left/in_middle", other(1, global_batch_size=2), "stage middle: --global-batch-size is 2,"
         " and it has begun with 4 in the checkpoint {checkpoint}: train_tokens would count its"),
        ("left/in_middle",
         other(1, train_tokens=512, lr_wsd_decay_iters=None, lr_decay_style="constant"),
         "stage middle: --train-iters 1 are fewer than the 2 that the checkpoint"),
        ("left/in_middle", other(1, segment_lengths=[32, 128], dilation_rates=[1, 2]),
         "stage middle: --segment-lengths is 32 128, but the checkpoint"),
    ],
)  # fmt: skip
def test_stages_that_contradict_the_checkpoint(runs, corpus, tmp_path, left, stages, message):
    file = recipe_of(runs, corpus, tmp_path / "recipe.yaml", stages, left)
    with pytest.raises(UserError) as error:
        first, *_ = stages_ahead(parse_run(["--config", str(file)]).resolve(1))
        starting_point(first.config, first)
    message = message.format(checkpoint=latest(runs / left))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"--config {file}, line ")


def test_what_may_change_between_two_starts(runs, corpus, tmp_path):
    for left, stages, ahead in (
        ("left/in_middle", other(2, lr=1.0, name="new", seq_length=128), ["middle", "new"]),
        (
            "left/in_middle",
            [*STAGES[:2], {"name": "x", "train_iters": 9}, STAGES[2]],
            ["middle", "x", "long"],
        ),
        ("left/in_middle", STAGES[:2], ["middle"]),
        ("left/in_middle", other(1, train_tokens=4096), ["middle", "long"]),
        ("left/in_short", other(0, train_iters=2), ["short", "middle", "long"]),
        ("left/end_of_short", other(0, train_iters=9), ["short", "middle", "long"]),
        ("left/end_of_short", STAGES, ["short", "middle", "long"]),
        ("whole", other(2, train_iters=9), ["long"]),
    ):
        file = recipe_of(runs, corpus, tmp_path / "recipe.yaml", stages, left)
        found = stages_ahead(parse_run(["--config", str(file)]).resolve(1))
        assert [stage.name for stage in found] == ahead
        starting_point(found[0].config, found[0])


def test_runs_with_and_without_stages_are_not_each_others(runs, corpus, tmp_path):
    plain = write_settings(tmp_path / "plain.yaml", str(corpus), load=str(runs / "by_hand" / "1"))
    flags = ["--config", str(plain), "--segment-lengths", "16", "64", "--dilation-rates", "1", "2"]
    [only] = parse_run(
        [*flags, "--save", str(runs / "whole"), "--load", str(runs / "whole")]
    ).resolve(1)
    with pytest.raises(UserError, match=r"is of a run of stages \(short, middle, long\)"):
        starting_point(only.config, only)
    file = write_settings(tmp_path / "staged.yaml", str(corpus), stages=STAGES, save="elsewhere",
                          load=str(runs / "by_hand" / "1"))  # fmt: skip
    with pytest.raises(UserError, match=r"is of a run without stages: --finetune begins the first"):
        stages_ahead(parse_run(["--config", str(file)]).resolve(1))
    begun = stages_ahead(parse_run(["--config", str(file), "--finetune"]).resolve(1))
    assert [stage.name for stage in begun] == ["short", "middle", "long"]


def test_the_flags_of_a_run_start_a_like_one(runs):
    again = parse_run(["--config", str(runs / "whole" / "flags.yaml")]).resolve(1)
    resolved = yaml.safe_load((runs / "whole" / "config.yaml").read_text())
    assert [stage.end for stage in again] == ENDS
    assert again[-1].config.model.yarn_rotary_scaling_factor == 2.0
    assert list(again[1].config.data.data_path) != resolved["data"]["data_path"]
    assert list(again[2].config.data.data_path) == resolved["data"]["data_path"]


def test_stages_may_be_evaluated_on_other_data_than_those_before_them(corpus, tmp_path):
    """Of one sources are divided, of the next not, and of the last again."""
    whole = {"train_data_path": str(corpus), "valid_data_path": str(corpus)}
    ways = ({"data_path": str(corpus)}, whole, {"data_path": str(corpus)})
    stages = [{"name": f"s{i}", "train_iters": 1, **way} for i, way in enumerate(ways)]
    folder = str(tmp_path / "run")
    settings = {"stages": stages, "data_path": None, "split": None, "save": folder, "load": folder}
    file = write_settings(tmp_path / "recipe.yaml", str(corpus), **settings)
    said = run_ranks(1, PRETRAIN, "--config", file).stdout
    assert "--split is not set; the checkpoint was written with 969,30,1" in said
    records = training_records(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [r["iteration"] for r in records] == [1, 2, 3]
    divided = [{"name": stage["name"], "train_iters": 1, **ways[0]} for stage in stages]
    settings |= {"split": "8,1,1", "stages": divided}
    file = write_settings(tmp_path / "recipe.yaml", str(corpus), **settings)
    first, *_ = stages_ahead(parse_run(["--config", str(file)]).resolve(1))
    with pytest.raises(UserError, match=r"stage s2: --split is 8,1,1, but the checkpoint"):
        starting_point(first.config, first)


def test_a_dry_run_and_a_stage_whose_data_is_missing(corpus, tmp_path):
    lost = other(2, data_path=["missing=nowhere"])
    folder = tmp_path / "run"
    file = write_settings(tmp_path / "recipe.yaml", str(corpus), stages=lost, save=str(folder))
    told = run_here(Path(PRETRAIN), "--config", file, "--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in told[:4]] == ["stage", "short", "middle", "long"]
    assert not folder.exists()
    refused = run_here(Path(PRETRAIN), "--config", file, check=False)
    assert refused.returncode == 2 and not folder.exists()
    assert refused.stderr.count("\n") == 1
    assert f"error: --config {file}, line " in refused.stderr
    assert "stage long: --data-path nowhere" in refused.stderr
