"""Where a run keeps its things, and how often it looks up."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from megalong.config.flags import default, flag, flag_name, require_more_than_zero, require_positive
from megalong.config.training import TrainingConfig
from megalong.utils.errors import UserError, counted


@dataclass(frozen=True)
class RunConfig:
    """Where a run keeps its things, and how often it looks up."""

    save: str | None = flag(None, "run folder: checkpoints, metrics.jsonl, config.yaml")
    load: str | None = flag(None, "run folder, or checkpoint, to resume from")
    finetune: bool = flag(
        False,
        "with --load: begin a new run with the checkpoint's weights, and nothing else of it",
    )
    pretrained_checkpoint: str | None = flag(
        None,
        "run folder, or checkpoint, to --finetune from as long as --load has no checkpoint",
    )
    load_optim: bool = flag(
        True,
        "load the optimizer's state (--no-load-optim: it begins with none, at every start: to be"
        " taken out after the first checkpoint)",
    )
    load_rng: bool = flag(
        True,
        "load the states of the random generators (--no-load-rng: those of the seed, at every"
        " start)",
    )
    new_data: bool = flag(
        False,
        "with --load: go on in the same run folder on training data that is all other; to be taken"
        " out after the first checkpoint on them",
    )
    load_fallback: bool = flag(
        False, "where the newest checkpoint is damaged, go on from the newest sound one before it"
    )
    verify_checkpoint: bool = flag(
        True,
        "compare a checkpoint with its hashes before loading it (--no-verify-checkpoint: don't)",
    )
    save_interval: int = flag(1000, "iterations between checkpoints; the last is always saved")
    async_save: bool = flag(
        False, "copy a checkpoint to host memory, and write it while the training goes on"
    )
    keep_last: int | None = flag(None, "checkpoints to keep, the older are removed (default: all)")
    keep_every: int | None = flag(
        None, "with --keep-last: keep also those whose iteration is a multiple of this"
    )
    keep_best: bool = flag(
        False,
        "keep the checkpoint of the lowest validation loss too, which `best` points to; of a run of"
        " stages that of the stage that is trained",
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
        None,
        "peak TFLOP/s of one device, of which MFU is a share (default: from a table; of a CPU"
        " measured)",
    )
    profile: bool = flag(False, "trace some iterations with torch.profiler, into the run folder")
    profile_step_start: int = flag(10, "with --profile: first iteration in the trace")
    profile_step_end: int = flag(12, "with --profile: first iteration after it")
    profile_ranks: tuple[int, ...] = flag((0,), "with --profile: ranks that are traced", item=int)
    exit_duration_in_mins: float | None = flag(
        None, "minutes after which the run saves a checkpoint and ends, as it does on SIGTERM"
    )
    distributed_timeout_minutes: int = flag(
        10, "minutes that a rank waits for the others in a collective before it gives the run up"
    )
    hang_timeout_seconds: float | None = flag(
        None,
        "seconds that all ranks wait for one that does not move before they end and say which it"
        " is; 0 is never (default: half of --distributed-timeout-minutes)",
    )

    @property
    def loads_optimizer(self) -> bool:
        """Whether a run that loads a checkpoint takes the optimizer's state from it too."""
        return self.load_optim and not self.finetune

    def resolve(self) -> RunConfig:
        """These settings with the TensorBoard folder and the time of a hang filled in."""
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
        if self.finetune and self.load is None:
            raise UserError("--finetune begins with the weights of a checkpoint: set --load")
        if self.new_data and self.load is None:
            raise UserError("--new-data is about a run that goes on: set --load, or leave it out")
        for name in ("load_optim", "load_rng"):
            if not getattr(self, name) and self.load is None:
                raise UserError(
                    f"--no-{flag_name(name)[2:]} is about a run that goes on: set --load, or leave"
                    " it out"
                )
        if self.new_data and self.finetune:
            raise UserError(
                "--new-data is about a run that goes on, and --finetune begins a new one, on any"
                " data: leave --new-data out"
            )
        if self.finetune and training.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--finetune takes the checkpoint's weights and nothing else of it, and"
                " --use-checkpoint-opt-param-scheduler its schedule: leave one of the two out"
            )
        self._check_checkpoints()
        self._check_reports()
        self._check_hang_timeout()
        if self.profile:
            self._check_profile(training.train_iters, world_size)

    def _check_checkpoints(self) -> None:
        require_positive(
            self, "save_interval", "log_interval", "eval_interval", "distributed_timeout_minutes"
        )
        if self.exit_duration_in_mins is not None:
            require_more_than_zero(self, "exit_duration_in_mins")
        for name in ("keep_last", "keep_every"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        for name in ("async_save", "keep_last", "keep_every", "keep_best"):
            if getattr(self, name) and self.save is None:
                raise UserError(
                    f"{flag_name(name)} is about checkpoints: set --save, or leave it out"
                )
        if self.keep_every is not None and self.keep_last is None:
            raise UserError(
                f"--keep-every {self.keep_every} says which old checkpoints stay, and without"
                " --keep-last all do: set --keep-last too"
            )
        if self.keep_every is not None and self.keep_every % self.save_interval:
            raise UserError(
                f"--keep-every {self.keep_every} is not a multiple of --save-interval"
                f" {self.save_interval}: set --keep-every"
                f" {-(-self.keep_every // self.save_interval) * self.save_interval}"
            )
        if self.keep_best_by is not None and not self.keep_best:
            raise UserError(
                f"--keep-best-by {self.keep_best_by} says what --keep-best goes by: set"
                " --keep-best, or leave it out"
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
        if self.eval_iters < 0:
            raise UserError(
                f"--eval-iters {self.eval_iters} must not be negative; 0 is the whole split"
            )

    def _check_reports(self) -> None:
        if self.peak_tflops is not None:
            require_more_than_zero(self, "peak_tflops")
        if self.wandb_exp_name is not None and self.wandb_project is None:
            raise UserError(
                f"--wandb-exp-name {self.wandb_exp_name} names a run in a project: set"
                " --wandb-project, or leave it out"
            )

    def _check_hang_timeout(self) -> None:
        seconds, minutes = self.hang_timeout_seconds, self.distributed_timeout_minutes
        assert seconds is not None
        if not 0 <= seconds < 60 * minutes:
            raise UserError(
                f"--hang-timeout-seconds {seconds:g} has to be less than"
                f" --distributed-timeout-minutes {minutes}, after which the wait is over anyway:"
                f" set --hang-timeout-seconds {30 * minutes}, or 0 for no such watch"
            )

    def _check_profile(self, train_iters: int, world_size: int) -> None:
        start, end = self.profile_step_start, self.profile_step_end
        if self.save is None:
            raise UserError("--profile writes a trace into the run folder: set --save")
        if not 1 <= start < end:
            raise UserError(
                f"--profile-step-start {start} and --profile-step-end {end} are the first iteration"
                " that is traced and the first after it, counted from 1: set --profile-step-end"
                f" {max(start, 1) + 2}" + (" and --profile-step-start 1" if start < 1 else "")
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
