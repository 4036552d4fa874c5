"""Where a run keeps its things, how often it looks up, and what it is evaluated on beside text."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from megalong.config.flags import (
    default,
    flag,
    refuse_without,
    require_more_than_zero,
    require_not_negative,
    require_positive,
)
from megalong.config.training import TrainingConfig
from megalong.evals import STYLES, TASKS
from megalong.utils.errors import UserError, counted


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its things, and how often it looks up."""

    save: str | None = flag(None, "run folder: checkpoints, metrics.jsonl, config.yaml")
    load: str | None = flag(None, "run folder, or checkpoint, to resume from")
    finetune: bool = flag(
        False, "with --load: begin a new run with the checkpoint's weights, and nothing else of it"
    )
    pretrained_checkpoint: str | None = flag(
        None, "run folder, or checkpoint, to --finetune from as long as --load has no checkpoint"
    )
    load_optim: bool = flag(
        True, "load the optimizer's state; take --no-load-optim out after the first checkpoint"
    )
    load_rng: bool = flag(
        True, "load the states of the random generators (--no-load-rng: take the seed's)"
    )
    new_data: bool = flag(
        False,
        "with --load: go on, on all other training data; take it out after the first checkpoint",
    )
    load_fallback: bool = flag(
        False, "where the newest checkpoint is damaged, go on from the newest sound one before it"
    )
    verify_checkpoint: bool = flag(True, "compare a checkpoint with its hashes before loading it")
    save_interval: int = flag(1000, "iterations between checkpoints; the last is always saved")
    async_save: bool = flag(
        False, "copy a checkpoint to host memory, and write it while the training goes on"
    )
    keep_last: int | None = flag(None, "checkpoints to keep, the older are removed (default: all)")
    keep_every: int | None = flag(
        None, "with --keep-last: keep also those whose iteration is a multiple of this"
    )
    keep_best: bool = flag(
        False, "keep the checkpoint of the lowest validation loss too (of a stage), as `best`"
    )
    keep_best_by: str | None = flag(
        None, "with --keep-best: the name of the validation set it goes by (default: the first)"
    )
    log_interval: int = flag(1, "iterations between log lines; the mean of their losses is logged")
    eval_interval: int = flag(1000, "iterations between evaluations; there is one at the end")
    eval_iters: int = flag(10, "global batches in one evaluation; 0 is the whole split")
    full_validation: bool = flag(False, "the evaluation at the end covers the whole split")
    tensorboard_dir: str | None = flag(
        None, "TensorBoard folder (default: tensorboard/ in the run folder)"
    )
    wandb_project: str | None = flag(None, "project on Weights & Biases (needs the package wandb)")
    wandb_exp_name: str | None = flag(None, "name of the run there (default: wandb chooses one)")
    peak_tflops: float | None = flag(
        None, "peak TFLOP/s of a device, for MFU (default: from a table; of a CPU measured)"
    )
    profile: bool = flag(False, "trace some iterations with torch.profiler, into the run folder")
    profile_step_start: int = flag(10, "with --profile: first iteration in the trace")
    profile_step_end: int = flag(12, "with --profile: first iteration after it")
    profile_ranks: tuple[int, ...] = flag((0,), "with --profile: ranks that are traced")
    exit_duration_in_mins: float | None = flag(
        None, "minutes after which the run saves a checkpoint and ends, as it does on SIGTERM"
    )
    distributed_timeout_minutes: int = flag(
        10, "minutes that a rank waits for the others in a collective before it gives the run up"
    )
    hang_timeout_seconds: float | None = flag(
        None,
        "seconds that ranks wait for one that does not move before they end and name it; 0: no end"
        " (default: half of --distributed-timeout-minutes)",
    )

    @property
    def loads_optimizer(self) -> bool:
        """Whether a run that loads a checkpoint takes the optimizer's state from it too."""
        return self.load_optim and not self.finetune

    def resolve(self) -> RunConfig:
        """Fill in the TensorBoard folder and the time of a hang."""
        folder = None if self.save is None else os.path.join(self.save, "tensorboard")
        return dataclasses.replace(
            self,
            tensorboard_dir=default(self.tensorboard_dir, folder),
            hang_timeout_seconds=default(
                self.hang_timeout_seconds, 30.0 * self.distributed_timeout_minutes
            ),
        )

    def check(self, training: TrainingConfig, world_size: int) -> None:
        """Raise UserError where these settings contradict each other, or such a training on so many
        ranks."""
        if self.load is None:
            going_on = ("load_optim", "load_rng", "new_data")
            refuse_without("a run that goes on", "--load", self, *going_on)
            refuse_without("the weights of a checkpoint", "--load", self, "finetune")
        if self.new_data and self.finetune:
            raise UserError(
                "--new-data is about a run that goes on, and --finetune begins one: leave it out"
            )
        if self.finetune and training.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--finetune takes weights alone, and --use-checkpoint-opt-param-scheduler the"
                " checkpoint's schedule: leave one of the two out"
            )
        self._check_checkpoints()
        seconds, minutes = self.hang_timeout_seconds, self.distributed_timeout_minutes
        assert seconds is not None
        if not 0 <= seconds < 60 * minutes:
            raise UserError(
                f"--hang-timeout-seconds {seconds:g} has to be less than"
                f" --distributed-timeout-minutes {minutes}: set {30 * minutes}, or 0 for no watch"
            )
        if self.profile:
            self._check_profile(training.train_iters, world_size)

    def _check_checkpoints(self) -> None:
        require_positive(
            self, "save_interval", "log_interval", "eval_interval", "distributed_timeout_minutes",
            "keep_last", "keep_every",
        )  # fmt: skip
        require_more_than_zero(self, "exit_duration_in_mins", "peak_tflops")
        require_not_negative(self, "eval_iters")
        if self.save is None:
            kept = ("async_save", "keep_last", "keep_every", "keep_best")
            refuse_without("checkpoints", "--save", self, *kept)
        if self.keep_last is None:
            refuse_without("which old checkpoints stay", "--keep-last too", self, "keep_every")
        if not self.keep_best:
            refuse_without("what --keep-best goes by", "--keep-best", self, "keep_best_by")
        if self.wandb_project is None:
            refuse_without("a run in a project", "--wandb-project", self, "wandb_exp_name")
        if self.keep_every is not None and self.keep_every % self.save_interval:
            raise UserError(
                f"--keep-every {self.keep_every} is not a multiple of --save-interval"
                f" {self.save_interval}: set --keep-every"
                f" {-(-self.keep_every // self.save_interval) * self.save_interval}"
            )
        if self.keep_best and self.eval_interval % self.save_interval:
            raise UserError(
                f"--keep-best needs a checkpoint where there is an evaluation, and --eval-interval"
                f" {self.eval_interval} is not a multiple of --save-interval {self.save_interval}:"
                f" set --save-interval {self.eval_interval}"
            )
        if self.keep_best and self.full_validation and self.eval_iters:
            raise UserError(
                "--keep-best compares evaluations on the same tokens, and --full-validation makes"
                " the last one on others: set --eval-iters 0, or leave one of the two out"
            )

    def _check_profile(self, train_iters: int, world_size: int) -> None:
        start, end = self.profile_step_start, self.profile_step_end
        if self.save is None:
            raise UserError("--profile writes a trace into the run folder: set --save")
        if not 1 <= start < end:
            first = max(start, 1)
            raise UserError(
                f"--profile-step-start {start} must be at least 1, --profile-step-end {end} larger:"
                f" set --profile-step-end {first + 2} and --profile-step-start {first}"
            )
        if start > train_iters:
            raise UserError(
                f"--profile-step-start {start} is after the last iteration, --train-iters"
                f" {train_iters}: lower it, and --profile-step-end"
            )
        for rank in self.profile_ranks:
            if not 0 <= rank < world_size:
                raise UserError(
                    f"--profile-ranks {rank}: this launch has {counted(world_size, 'rank')},"
                    " numbered from 0"
                )


@dataclass(frozen=True)
class TasksConfig:
    """Tasks that a run is evaluated on beside held-out text."""

    eval_tasks: tuple[str, ...] | None = flag(
        None, "tasks, made on the fly, that ask for what was said long before", choices=tuple(TASKS)
    )
    eval_task_style: str | None = flag(
        None,
        "of text of the tokenizer (the default), or of bare ids, for a model trained on such",
        choices=STYLES,
    )
    eval_task_lengths: tuple[int, ...] | None = flag(
        None, "tokens of their samples (default: --seq-length)"
    )
    eval_task_samples: int | None = flag(None, "samples of each task and length (default: 32)")
    eval_task_interval: int | None = flag(
        None, "iterations between their evaluations (default: --eval-interval)"
    )

    def description(self, seq_length: int) -> str:
        """Say what is evaluated on, and how much there is to read (after `resolve`)."""
        assert self.eval_tasks is not None and self.eval_task_lengths is not None
        lengths = ", ".join(f"{length:,}" for length in self.eval_task_lengths)
        made_of = "text" if self.eval_task_style == "text" else "bare ids"
        sequences = len(self.eval_tasks) * len(self.eval_task_lengths) * self.eval_task_samples
        return (
            f"tasks: {', '.join(self.eval_tasks)}, of {made_of}, {lengths} tokens,"
            f" {counted(self.eval_task_samples, 'sample')} of each, every"
            f" {counted(self.eval_task_interval, 'iteration')}: an evaluation reads"
            f" {counted(sequences, 'sequence')} of {seq_length:,},"
            f" {counted(sequences * seq_length, 'token')}"
        )

    def resolve(self, seq_length: int, eval_interval: int) -> TasksConfig:
        """Fill in what is open where there are tasks; an empty list of them is none."""
        if not self.eval_tasks:
            return dataclasses.replace(self, eval_tasks=None)
        return dataclasses.replace(
            self,
            eval_tasks=tuple(dict.fromkeys(self.eval_tasks)),
            eval_task_style=default(self.eval_task_style, "text"),
            eval_task_lengths=tuple(dict.fromkeys(default(self.eval_task_lengths, (seq_length,)))),
            eval_task_samples=default(self.eval_task_samples, 32),
            eval_task_interval=default(self.eval_task_interval, eval_interval),
        )

    def check(self, seq_length: int, causal: bool) -> None:
        """Raise UserError where these settings are not for such a run (after `resolve`)."""
        if self.eval_tasks is None:
            return refuse_without("tasks", "--eval-tasks", self, *vars(self))
        if not causal:
            what = "predicting the next token"
            refuse_without(what, "--objective causal", self, "eval_tasks")
        require_positive(self, "eval_task_samples", "eval_task_interval")
        assert self.eval_task_lengths is not None
        for length in self.eval_task_lengths:
            if length > seq_length:
                raise UserError(
                    f"--eval-task-lengths {length} is longer than --seq-length {seq_length}: leave"
                    " it out; tools/evaluate.py tries a checkpoint at other lengths"
                )


@dataclass(frozen=True)
class SamplesConfig:
    """Texts that a run continues while it trains, to be read."""

    sample_prompts: tuple[str, ...] | None = flag(
        None, "texts to continue now and then, or .txt files with one in each line"
    )
    sample_interval: int | None = flag(
        None, "iterations between such samples (default: --eval-interval)"
    )
    sample_tokens: int | None = flag(None, "tokens of a continuation (default: 32)")
    sample_temperature: float | None = flag(
        None, "of the draws of their tokens; 0, the default, takes the likeliest always"
    )

    def resolve(self, eval_interval: int) -> SamplesConfig:
        """Fill in what is open where there are prompts; an empty list of them is none."""
        if not self.sample_prompts:
            return dataclasses.replace(self, sample_prompts=None)
        return dataclasses.replace(
            self,
            sample_interval=default(self.sample_interval, eval_interval),
            sample_tokens=default(self.sample_tokens, 32),
            sample_temperature=default(self.sample_temperature, 0.0),
        )

    def check(self, causal: bool) -> None:
        """Raise UserError where these settings are not for such a run (after `resolve`)."""
        if self.sample_prompts is None:
            return refuse_without("samples", "--sample-prompts", self, *vars(self))
        if not causal:
            what = "predicting the next token"
            refuse_without(what, "--objective causal", self, "sample_prompts")
        require_positive(self, "sample_interval", "sample_tokens")
        require_not_negative(self, "sample_temperature")
