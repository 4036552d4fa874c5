"""The stage in which a run goes on, by its checkpoint, and what that has seen of the stages."""

import dataclasses
from pathlib import Path

import pytest

from megalong.checkpoint.content import Progress
from megalong.training import stages as stages_of_run
from megalong.training.stages import begun, stages_ahead
from megalong.utils.errors import UserError
from tests.recipe_file import changed, stages_of, write_recipe


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


def test_a_stage_may_be_made_as_short_as_it_is(file, ahead):
    progress = at(6)
    changed(file, ("train-iters: 10", "train-iters: 6"))
    assert ahead(progress) == ["short", "long"]
    changed(file, ("train-iters: 6", "train-iters: 6\n    lr_decay_iters: 10"))
    assert ahead(progress) == ["short", "long"]
    changed(file, ("lr_decay_iters: 10", "lr_decay_iters: 9"))
    with pytest.raises(UserError, match=r"where --lr-decay-iters was 10, and here it is 9"):
        ahead(progress)
    changed(file, ("\n    lr_decay_iters: 9", ""))
    # What the checkpoints after that have of it is as it was.
    goes_on = begun(progress, stages_of()[1], stages_of()[1].config)
    assert goes_on.stages[0]["settings"]["train_iters"] == 10
    goes_on = dataclasses.replace(goes_on, iteration=8)
    assert ahead(goes_on) == ["long"]
    changed(file, ("\nlr: 1.0e-3", "\nlr: 2.0e-3"))
    for reached in (progress, goes_on):
        with pytest.raises(UserError, match=r"where --lr was 0.001, and here it is 0.002"):
            ahead(reached)
    changed(file, ("\nlr: 2.0e-3", "\nlr: 1.0e-3"), ("train-iters: 6", "train-iters: 10"))
    with pytest.raises(UserError, match=r"where --train-iters was 6, and here it is 10: set it"):
        ahead(goes_on)
    assert ahead(progress) == ["short", "long"]


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


def test_a_record_that_is_older_than_a_setting_had_its_default(file, ahead):
    changed(file, ("save: run\n", "save: run\nrope_scaling_factor: 2\n"))
    done = at(12)
    for record in done.stages:
        del record["settings"]["rope_low_freq_factor"]
    assert ahead(done) == ["long"]
    changed(file, ("save: run\n", "save: run\nrope_low_freq_factor: 2\n"))
    with pytest.raises(UserError, match=r"where --rope-low-freq-factor was 1.0, and here it is 2"):
        ahead(done)
