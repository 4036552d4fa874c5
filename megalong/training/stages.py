"""Find where a run goes on, by its checkpoint: in which stage, and where in its blend."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalong.checkpoint.content import Progress, read_progress
from megalong.checkpoint.manifest import DamagedCheckpoint
from megalong.config import Config, flag_name
from megalong.config.flags import shown
from megalong.config.stages import WHAT, Stage
from megalong.data.blend import Blend, History
from megalong.model.optimizers import optimizer_of
from megalong.training.resuming import comparable_settings, found_checkpoint
from megalong.utils.errors import UserError

REPEATS = 4  # epochs, after which more of the same text teaches little (arXiv 2305.16264)


def next_sample(progress: Progress, config: Config) -> int:
    """The first sample of the blend that was not trained on. A run that goes on with longer
    sequences goes on at the same place."""
    return -(-progress.consumed_tokens // config.model.seq_length)


def blend_from(blend: Blend, progress: Progress, config: Config) -> tuple[Blend, list[str]]:
    """Return what is trained on from here on, and what is new about it since the checkpoint."""
    if not progress.consumed_tokens:
        return blend, []
    history = History.from_values(progress.blend)
    return blend.continued(next_sample(progress, config), history)


def repeated(blend: Blend, progress: Progress, config: Config) -> list[str]:
    """Say which sources the run reads more often than helps until the end of its stage."""
    training, length = config.training, config.model.seq_length
    samples = (training.train_iters - progress.iteration) * training.global_batch_size
    lines = []
    for name, (_, epochs) in blend.realised(next_sample(progress, config)).items():
        tokens = blend.epoch_tokens[name]
        epochs += float(blend.shares[name]) * samples * length / tokens
        if epochs > REPEATS:
            lines.append(
                f"source {name}: {tokens:,} tokens, which are read {epochs:.1f} times until"
                f" iteration {training.train_iters}: beyond {REPEATS} times text teaches little"
            )
    return lines


def make_orders(blend: Blend, checkpoint: Path | None, config: Config) -> None:
    """Put into the cache, if there is one, what the run will first read of each source, while
    nobody waits for this rank."""
    if config.data.data_cache_path is None:
        return
    progress = Progress()
    if checkpoint is not None and not config.run.finetune:
        with contextlib.suppress(DamagedCheckpoint):  # which all ranks will find together
            progress = read_progress(checkpoint)
    blend, _ = blend_from(blend, progress, config)
    blend.make_orders(next_sample(progress, config))


def stages_ahead(stages: Sequence[Stage]) -> Sequence[Stage]:
    """Return the stage that a run goes on in, and those after it.

    A checkpoint at the end of a stage is of that stage, whose last evaluation may be missing.
    Raises UserError where the stages contradict those that the checkpoint has seen.
    """
    first = stages[0]
    if first.name is None or first.config.run.finetune:
        return stages
    checkpoint = found_checkpoint(first.config)
    if checkpoint is None:
        return stages
    progress = read_progress(checkpoint)
    if progress.iteration == 0:  # an imported model
        return stages
    if not progress.stages:
        raise UserError(
            f"the checkpoint {checkpoint} is of a run without stages: --finetune begins the first"
            " stage with its weights, in another folder"
        )
    for number, record in enumerate(progress.stages):
        _check_name(stages, number, record, checkpoint)
    number = len(progress.stages) - 1
    ends = [record["begin"] for record in progress.stages[1:]]
    for stage, record, end in zip(stages, progress.stages, ends, strict=False):
        _check_settings(stage, record, end, checkpoint)
    stage, record = stages[number], progress.stages[number]
    _check_counted_tokens(stage, record, checkpoint)
    if progress.iteration == stage.end:
        _check_settings(stage, record, stage.end, checkpoint)
    elif progress.iteration > stage.end:
        with stage.settings.errors():
            raise UserError(
                f"--train-iters {stage.iterations} are fewer than the"
                f" {progress.iteration - stage.begin} that the checkpoint {checkpoint} has of it"
            )
    return stages[number:]


def begun(progress: Progress, stage: Stage | None, config: Config) -> Progress:
    """The progress of a run that goes on in a stage. config: as it does."""
    if stage is None or stage.name is None:
        return dataclasses.replace(progress, stages=[])
    before = [record for record in progress.stages if record["begin"] < stage.begin]
    record = {"name": stage.name, "begin": stage.begin, "settings": what_counts(config)}
    return dataclasses.replace(progress, stages=[*before, record])


def check_is_of(stage: Stage | None, progress: Progress, checkpoint: Path) -> None:
    """Raise UserError where `--load-fallback` has gone past all checkpoints of the stage."""
    if stage is not None and progress.iteration < stage.begin:
        raise UserError(
            f"{checkpoint.name} is the newest sound checkpoint, and older than the stage"
            f" {stage.name}: the same command, started again, goes on from there"
        )


def what_counts(config: Config) -> dict[str, Any]:
    """Return the settings that the result of a stage hangs on, as JSON has them."""
    of_optimizer = optimizer_of(config.training).flags
    common = [name for name in vars(config.training) if name.startswith(of_optimizer)]
    return json.loads(json.dumps(comparable_settings(config, [*WHAT, "precision", *common])))


def _check_name(
    stages: Sequence[Stage], number: int, record: dict[str, Any], checkpoint: Path
) -> None:
    """Raise UserError where a stage that the checkpoint has begun is not there, or elsewhere."""
    name, names = record["name"], [str(stage.name) for stage in stages]
    if number < len(names) and names[number] == name:
        return
    if name in names:
        place = names.index(name)
        with stages[place].settings.errors():
            raise UserError(
                f"is number {place + 1} here, and number {number + 1} in the checkpoint"
                f" {checkpoint}: put it back there"
            )
    file = stages[0].settings.file
    assert file is not None
    raise UserError(
        f"{file.where('stages')}: stages: none is called {name}, and the checkpoint {checkpoint}"
        f" has begun it as number {number + 1}; here are {', '.join(names)}: put it back"
    )


def _check_counted_tokens(stage: Stage, record: dict[str, Any], checkpoint: Path) -> None:
    """Raise UserError where a stage that has begun would count its tokens in other batches."""
    ours, before = what_counts(stage.config), record["settings"]
    for name in ("global_batch_size", "seq_length"):
        if stage.settings.tokens is not None and ours[name] != before[name]:
            with stage.settings.errors():
                raise UserError(
                    f"{flag_name(name)} is {shown(ours[name])}, and it has begun with"
                    f" {shown(before[name])} in the checkpoint {checkpoint}: train_tokens would"
                    " count its iterations wrongly: set train_iters instead"
                )


def _check_settings(stage: Stage, record: dict[str, Any], end: int, checkpoint: Path) -> None:
    """Raise UserError where a stage that is done was another one. end: its last iteration, before
    that of its record where the stage has been made shorter."""
    ours = what_counts(stage.config)
    before = dict(record["settings"])
    follows = before["lr_decay_iters"] == before["train_iters"] - record["begin"]
    if follows and ours["lr_decay_iters"] == stage.iterations:  # which is compared by itself
        before["lr_decay_iters"] = stage.iterations
    before["train_iters"] = end

    def in_words(source: Sequence[str]) -> str:
        name, amount, unit = source
        return f"{amount} {name}" if unit == "weight" else f"{name} ({amount} {unit})"

    if stage.given.training.global_batch_size is None:  # it hangs on the number of ranks
        del ours["global_batch_size"]
    for name, then in before.items():
        now = ours.get(name, then)
        if now == then:
            continue
        if name == "train_iters":  # both count from the beginning of the run
            now, then = stage.iterations, end - record["begin"]
        what = flag_name(name)
        if name == "sources":
            what = "its training data"
            now, then = (" ".join(map(in_words, sources)) for sources in (now, then))
        with stage.settings.errors():
            raise UserError(
                f"is done in the checkpoint {checkpoint}, where {what} was {shown(then)}, and"
                f" here it is {shown(now)}: set it to that again"
            )
