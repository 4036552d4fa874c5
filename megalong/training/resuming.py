"""Find the checkpoint that a run goes on from, and say what the run does otherwise than that one's.

What a look at the files shows is found before anything is launched; their hashes the ranks share,
afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalong.checkpoint.content import Progress, read_progress, read_settings
from megalong.checkpoint.folder import (
    being_read,
    has_pointer,
    is_checkpoint_or_run,
    latest,
    newest_first,
    point_at,
    set_aside,
)
from megalong.checkpoint.manifest import DamagedCheckpoint, check_files, check_share
from megalong.config import Config, ModelConfig, TrainingConfig, flag_name
from megalong.config.arguments import config_from_values
from megalong.config.attention import PATTERN_FIELDS
from megalong.config.flags import shown
from megalong.config.memory import PIECES
from megalong.config.model import FACTORS, ROPE_FIELDS, lost_fields
from megalong.config.stages import HOW, WHAT, Stage
from megalong.data.blend import History
from megalong.data.sources import sources_of_flag
from megalong.model.optimizers import optimizer_of
from megalong.training.learning_rate import learning_rate
from megalong.training.run_folder import same_folder
from megalong.utils.errors import UserError, system_errors_of

# What the learning rate of an iteration hangs on.
SCHEDULE = (
    "lr", "min_lr", "lr_decay_style", "lr_decay_power", "lr_decay_iters", "lr_warmup_iters",
    "lr_wsd_decay_style", "lr_wsd_decay_iters", "lr_begin_iters",
)  # fmt: skip
_DATA = (
    "split", "valid_data_path", "test_data_path", "sample_mode", "length_upsampling",
)  # fmt: skip
_STEP = (
    "seq_length", "global_batch_size", "precision", "loss_scale", "clip_grad", "weight_decay",
    "z_loss_coeff", "skip_loss_spikes", "loss_spike_window",
)  # fmt: skip
# What moves the loss of a batch from one step to the next; and so do other sources.
_MOVES_THE_LOSS = (
    "objective", "mask_rate", "eod_mask_loss", "document_attention", "seq_length", "split",
    "sample_mode", "length_upsampling", "xpos_scale_base", *PATTERN_FIELDS, *ROPE_FIELDS,
)  # fmt: skip


def config_of(checkpoint: Path) -> Config:
    """The configuration that a checkpoint was written with.

    Raises UserError where it cannot be read.
    """
    return config_from_values(read_settings(checkpoint))


def differences(ours: Config, theirs: Config, names: list[str]) -> dict[str, tuple[Any, Any]]:
    """The values of these fields that differ, in two configurations."""
    here, there = _values(ours), _values(theirs)
    return {
        name: (here[name], there[name])
        for name in names
        if _comparable(name, here[name]) != _comparable(name, there[name])
    }


def comparable_settings(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """The values of these fields as they are compared: the data to train on is "sources", a list of
    names and amounts."""
    values = _values(config)
    data = ("data_path", "data_blend", "train_data_path")
    found = {name: _comparable(name, values[name]) for name in names if name not in data}
    sources = config.data.training_sources()
    return found | {"sources": [[each.name, str(each.amount), each.unit] for each in sources]}


def other_ways(checkpoint: Path, config: Config, new_stage: bool = False) -> list[str]:
    """Say what a run does otherwise than that of the checkpoint, and may, a line each.

    config: with its memory path settled. new_stage: whether a stage begins, with its own schedule.
    """
    theirs, iteration = config_of(checkpoint), read_progress(checkpoint).iteration
    names = ["objective", *PATTERN_FIELDS, *ROPE_FIELDS, "xpos_scale_base", "document_attention"]
    goes_on = iteration > 0 and not config.run.finetune  # an imported model has seen no data
    if goes_on:
        of_optimizer = optimizer_of(config.training).flags
        names += ["mask_rate", "eod_mask_loss", "seed", "optimizer", *_DATA, *_STEP]
        names += [name for name in vars(config.training) if name.startswith(of_optimizer)]
        names += [] if new_stage else ["train_iters", *SCHEDULE]
    found = differences(config, theirs, names)
    if found.get("train_iters") == found.get("lr_decay_iters"):
        found.pop("lr_decay_iters", None)  # follows from the other
    lines = [
        f"{flag_name(name)} is {shown(now)}; the checkpoint was written"
        f" {'without' if before is None else f'with {shown(before)}'}"
        for name, (now, before) in found.items()
    ]
    if goes_on:
        if not new_stage:
            lines += _learning_rate_change(iteration, config.training, theirs.training)
        lines += _memory_path_change(config, theirs)
    return lines


def moves_the_loss(checkpoint: Path, config: Config) -> bool:
    """Whether a run that goes on has other losses from its first step on, for the same weights.
    Of its sources `Blend.continued` tells."""
    return bool(differences(config, config_of(checkpoint), [*_MOVES_THE_LOSS]))


def with_schedule_of(checkpoint: Path, config: Config) -> Config:
    """The configuration with the checkpoint's schedule of the learning rate."""
    theirs = read_settings(checkpoint)
    schedule = {name: theirs[name] for name in SCHEDULE}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **schedule))


def _learning_rate_change(
    iteration: int, ours: TrainingConfig, theirs: TrainingConfig
) -> list[str]:
    rate, kept = (learning_rate(iteration + 1, training) for training in (ours, theirs))
    if rate == kept or iteration >= ours.train_iters:
        return []
    return [
        f"the learning rate goes from {learning_rate(iteration, theirs):.3e} at iteration"
        f" {iteration} to {rate:.3e} at iteration {iteration + 1}; with the checkpoint's schedule"
        f" (--use-checkpoint-opt-param-scheduler) to {kept:.3e}"
    ]


def _memory_path_change(ours: Config, theirs: Config) -> list[str]:
    before, now = _memory_path(theirs), _memory_path(ours)
    if theirs.memory.memory_path == "auto" or before == now:
        return []
    return [f"the memory path is {now}; that of the checkpoint's run was {before}"]


def _memory_path(config: Config) -> str:
    flags = [flag_name(piece) for piece in PIECES if getattr(config.memory, piece)]
    if config.parallel.recompute_granularity is not None:
        flags.append(f"--recompute-granularity {config.parallel.recompute_granularity}")
    return " ".join(flags) or "off"


def _values(config: Config) -> dict[str, Any]:
    sections = (config.model, config.attention, config.training, config.data)
    return {name: value for section in sections for name, value in vars(section).items()}


def _comparable(name: str, value: Any) -> Any:
    """Data and tokenizers may have moved to another folder since."""
    if value is None:
        return None
    if name.endswith("data_path"):
        return [source.name for source in sources_of_flag(value, flag_name(name))]
    return Path(value).name if name == "tokenizer_model" else value


def starting_point(config: Config, stage: Stage | None = None) -> tuple[Config, Path | None]:
    """Find the checkpoint that the run begins with, and complete the configuration by it: what
    `--pretrained-checkpoint` stands for, and whose schedule it is. Raises UserError."""
    run = config.run
    with system_errors_of("--load", str(run.load)):
        goes_on = run.load is not None and is_checkpoint_or_run(Path(run.load))
    if run.pretrained_checkpoint is not None and not goes_on:
        run = dataclasses.replace(run, load=run.pretrained_checkpoint, finetune=True)
        training = dataclasses.replace(config.training, use_checkpoint_opt_param_scheduler=False)
        config = dataclasses.replace(config, run=run, training=training)
    checkpoint = open_checkpoint(config, stage)
    if checkpoint is not None and config.training.use_checkpoint_opt_param_scheduler:
        config = with_schedule_of(checkpoint, config)
    return config, checkpoint


def open_checkpoint(config: Config, stage: Stage | None = None) -> Path | None:
    """Find the checkpoint that `--load` names (see `found_checkpoint`). Raises UserError where it
    is one of another model or, in the same folder, of a run on other data."""
    checkpoint = found_checkpoint(config)
    if checkpoint is not None:
        with system_errors_of(_flag(config), str(config.run.load)), _of(stage):
            _check_same_run(checkpoint, config, stage)
    return checkpoint


def found_checkpoint(config: Config) -> Path | None:
    """Find the checkpoint that `--load` names: of a run the one in force, with `--load-fallback`
    the newest whose files are all there. None for a run that starts at the beginning: one with the
    same `--save` and `--load` may have been killed before its first. Raises UserError."""
    load = config.run.load
    if load is None:
        return None
    with system_errors_of(_flag(config), load):
        in_its_folder = same_folder(load, config.run.save)
        if config.run.finetune and in_its_folder:
            raise UserError(
                f"--finetune begins a new run, and --save {load} is where that of the checkpoint"
                " is: --save into another folder"
            )
        if config.run.new_data and not config.run.finetune and not in_its_folder:
            raise UserError(
                f"--new-data is about a run that goes on in its folder, and --load {load} is not"
                " the folder of --save: leave it out"
            )
        if not is_checkpoint_or_run(Path(load)):
            if in_its_folder:
                return None
            hint = ""
            if (Path(load) / "config.json").exists():
                hint = "; a model of Transformers is imported by tools/convert_from_hf.py"
            raise UserError(f"{_flag(config)} {load}: no checkpoint there (no file `latest`){hint}")
        return _first_sound(_candidates(config), check_files, config)[0]


def _of(stage: Stage | None) -> contextlib.AbstractContextManager[None]:
    """Inside, errors say of which stage they are."""
    return contextlib.nullcontext() if stage is None else stage.settings.errors()


def _flag(config: Config) -> str:
    """The one that names the checkpoint."""
    run = config.run
    from_others = run.finetune and run.load == run.pretrained_checkpoint
    return "--pretrained-checkpoint" if from_others else "--load"


@contextlib.contextmanager
def sound_checkpoint(
    config: Config, say: Callable[[str], None], stage: Stage | None = None
) -> Iterator[Path]:
    """Hold the checkpoint that the run goes on from, sound down to its hashes (unless
    `--no-verify-checkpoint`), of which each rank compares a share: no other run removes it.

    Called by every rank where `open_checkpoint` has found one. say: tells what is damaged, if
    `--load-fallback` goes past it. Raises UserError on every rank.
    """
    with contextlib.ExitStack() as held:

        def check(candidate: Path) -> None:
            _check_together(candidate, config.run.verify_checkpoint, held)

        with system_errors_of(_flag(config), config.run.load):
            # A network file system may show each rank its own: what rank 0 sees counts.
            candidates = [_candidates(config) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(candidates, src=0)
            checkpoint, damage = _first_sound(candidates[0], check, config)
            with _of(stage):
                _check_same_run(checkpoint, config, stage)
            if damage and dist.get_rank() == 0:
                for line in damage.values():
                    say(f"{line}: going on from {checkpoint.name} (--load-fallback)")
                if same_folder(config.run.load, config.run.save):
                    point_at(checkpoint)
                    for damaged in damage:
                        set_aside(damaged)
        yield checkpoint


def check_agreement(config: Config, checkpoint: Path | None) -> None:
    """Raise UserError on every rank where only some have found a checkpoint to go on from."""
    found: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(found, checkpoint is not None and not config.run.finetune)
    if len(set(found)) > 1:
        blind = [rank for rank, sees in enumerate(found) if not sees]
        raise UserError(
            f"--load {config.run.load}: ranks {', '.join(map(str, blind[:8]))} see no checkpoint"
            " there, others do: it has to be a folder that all nodes share"
        )


def _candidates(config: Config) -> list[Path]:
    """The checkpoint in force, and with `--load-fallback` those before it, the newest first."""
    run = Path(config.run.load)
    if not has_pointer(run):
        return [run.resolve()]  # one of them, `best` say
    if config.run.load_fallback:
        return newest_first(run)
    in_force = latest(run)
    if in_force is None:
        raise UserError(
            f"{_flag(config)} {run}: the file `latest` names no checkpoint: --load-fallback takes"
            " the newest sound one"
        )
    return [in_force]


def _first_sound(
    candidates: list[Path], check: Callable[[Path], object], config: Config
) -> tuple[Path, dict[Path, str]]:
    """The first candidate that passes the check, and those before it with what is wrong."""
    found: dict[Path, str] = {}
    for checkpoint in candidates:
        try:
            check(checkpoint)
            return checkpoint, found
        except DamagedCheckpoint as damage:
            found[checkpoint] = str(damage)
            if not config.run.load_fallback:
                raise UserError(
                    f"{_flag(config)} {config.run.load}: {damage}; --load-fallback goes on from the"
                    " newest sound checkpoint before it"
                ) from damage
    wrong = "; ".join(found.values()) or "none left"
    raise UserError(f"{_flag(config)} {config.run.load}: no checkpoint there is sound: {wrong}")


def _check_together(checkpoint: Path, verify: bool, held: contextlib.ExitStack) -> None:
    """Check a checkpoint, every rank a share of it, and hold on to it. Raises the same
    DamagedCheckpoint on all."""
    finding = None
    try:
        held.enter_context(being_read(checkpoint))
        manifest = check_files(checkpoint)
        if verify:
            check_share(checkpoint, manifest, dist.get_rank(), dist.get_world_size())
    except DamagedCheckpoint as damage:
        finding = str(damage)
    findings: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, finding)
    for finding in findings:
        if finding is not None:
            raise DamagedCheckpoint(finding)


# What may differ between a checkpoint and the run that goes on from it.
_FREE_MODEL_FIELDS = {"seq_length", "init_method_std", "transformer_impl"}
# What a run in the same folder keeps: its data order and its held-out documents hang on it, and its
# losses would not be one curve.
_RUN_FIELDS = ["objective", "mask_rate", "seed", "split", *PATTERN_FIELDS]
# And what a stage may have otherwise than the one before it.
_STAGE_FIELDS = {*WHAT, *HOW}


def _check_same_run(checkpoint: Path, config: Config, stage: Stage | None) -> None:
    progress = read_progress(checkpoint)
    new_stage = stage is not None and progress.iteration == stage.begin > 0
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in _FREE_MODEL_FIELDS]
    names += ["tokenizer_type", "tokenizer_model", "prepend_bos"]
    theirs = config_of(checkpoint)
    if config.run.finetune:
        # Other positions have the same weights: what is set is meant, what is not set is forgotten.
        given = () if stage is None else stage.settings.meant
        lost = lost_fields(config.model, theirs.model, given)
        names = [name for name in names if name not in ROPE_FIELDS or name in lost]
    # An imported model has met no optimizer.
    if config.run.loads_optimizer and progress.iteration:
        names.append("optimizer")
    if same_folder(config.run.load, config.run.save):
        names += _RUN_FIELDS
        _check_has_stages(checkpoint, progress, stage)
        if not config.run.new_data and not new_stage:
            _check_same_data(checkpoint, config)
    if new_stage:
        free = _STAGE_FIELDS
        if None in (config.data.split, theirs.data.split):
            free = free | {"split"}  # one of the two has data of its own to be evaluated on
        names = [name for name in names if name not in free]
    for name, (here, there) in differences(config, theirs, names).items():
        way_out = f"start a new run without {_flag(config)}"
        if name in _RUN_FIELDS:
            way_out = "--save into another folder"
        if name == "optimizer":
            way_out = "set --no-load-optim"
        if name in ROPE_FIELDS and not config.run.finetune:
            way_out = "set --finetune, to begin a new run with the same weights at other positions"
        elif name in FACTORS:  # the default is no forgotten flag
            way_out = "to 1 to turn it off"
        elif name in ROPE_FIELDS and here is None:
            way_out = "to null in a file"
        elif name in ROPE_FIELDS:
            way_out = f"to {shown(here)} on the command line, if that is meant"
        if name in ("make_vocab_size_divisible_by", "padded_vocab_size"):
            way_out += ", or, for an imported model, import it with another one"
        raise UserError(
            f"{flag_name(name)} is {shown(here)}, but the checkpoint {checkpoint} was written with"
            f" {shown(there)}: set it to that, or {way_out}"
        )


def _check_has_stages(checkpoint: Path, progress: Progress, stage: Stage | None) -> None:
    """Raise UserError where a run of stages would go on in its folder as one that has none."""
    if progress.stages and (stage is None or stage.name is None):
        names = ", ".join(record["name"] for record in progress.stages)
        raise UserError(
            f"the checkpoint {checkpoint} is of a run of stages ({names}), and --config names no"
            " file with `stages:`: set it to that of the run (or to flags.yaml in its folder), or"
            " --save into another folder"
        )


def _check_same_data(checkpoint: Path, config: Config) -> None:
    """Raise UserError where a run in the same folder would share no source with the checkpoint."""
    blend = read_progress(checkpoint).blend
    if blend is None:  # nothing was read yet
        return
    known = list(History.from_values(blend).epoch_tokens)
    ours = [source.name for source in config.data.training_sources()]
    if not set(known) & set(ours):
        raise UserError(
            f"the training data is {', '.join(ours)}, and the checkpoint {checkpoint} has seen"
            f" {', '.join(known)}: keep one of these (NAME=PATH says what a path is), or set"
            " --new-data where all is to be new, or --save into another folder"
        )
