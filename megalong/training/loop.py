"""A run from its checkpoint to its end, stage after stage: step, log, save, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from megalong.checkpoint.content import Progress
from megalong.checkpoint.folder import checkpoint_folder
from megalong.checkpoint.reading import CheckpointReader
from megalong.checkpoint.writing import Saver
from megalong.config import Config, unused
from megalong.config.arguments import to_yaml
from megalong.config.stages import Stage
from megalong.data.batches import (
    Batch,
    evaluation_batches,
    made_ahead,
    num_evaluation_batches,
    training_batches,
)
from megalong.model.build import build_model, check_backend
from megalong.model.memory_path import settle_memory_path
from megalong.parallel import build_mesh, process_group, temporary_mesh, watch_ranks
from megalong.parallel.mesh import Mesh
from megalong.training.deepspeed_config import deepspeed_config
from megalong.training.engine import TrainingEngine, weights_divider
from megalong.training.engine_state import load_checkpoint, progress_to_save, tensors_to_save
from megalong.training.evaluation import batches_of, continued, evaluate, evaluate_task
from megalong.training.learning_rate import learning_rate
from megalong.training.profiling import Profiler
from megalong.training.reports import Reports, say
from megalong.training.resuming import (
    check_agreement,
    moves_the_loss,
    sound_checkpoint,
    starting_point,
)
from megalong.training.run_data import (
    RunData,
    best_set,
    check_same_masks,
    open_run_data,
    validation_sets,
)
from megalong.training.run_folder import (
    BestCheckpoint,
    leave_unfinished,
    open_run_folder,
    same_folder,
)
from megalong.training.stages import (
    begun,
    blend_from,
    check_is_of,
    make_orders,
    next_sample,
    repeated,
)
from megalong.training.stopping import FAILED_SAVE, Stopped, StopRequest
from megalong.training.training_loss import StepResult
from megalong.utils.errors import UserError
from megalong.utils.progress import progress_bar


class Trainer:
    """One run, or one stage of it, to the trained model in the run folder.

    given: the configuration before it was resolved. checkpoint: where to go on from, or None.
    stop: asked after each step, and before the model is built, where this raises Stopped.
    """

    def __init__(
        self,
        config: Config,
        given: Config,
        data: RunData,
        checkpoint: Path | None,
        mesh: Mesh,
        stop: StopRequest,
        stage: Stage | None = None,
    ):
        config, memory_path = settle_memory_path(config, data.tokenizer.vocab_size, mesh)
        self.config, self.data, self.mesh, self.stop = config, data, mesh, stop
        self.begin = 0 if stage is None else stage.begin
        flags = to_yaml(given, leave_out="open") if stage is None else stage.flags
        self.lock = open_run_folder(config, flags) if mesh.is_main else None
        self.progress = Progress()
        self._unread: deque[tuple[int, StepResult]] = deque()  # results of the newest iterations
        self._stop_before_the_building()
        check_agreement(config, checkpoint)
        check_same_masks(data)
        with contextlib.ExitStack() as held:
            if checkpoint is not None:
                checkpoint = held.enter_context(sound_checkpoint(config, say, stage))
            vocab_size = data.tokenizer.vocab_size
            divide = weights_divider(config, mesh)
            model = build_model(config, vocab_size, mesh, checkpoint is None, divide)
            self.engine = TrainingEngine(model, config, mesh, data.train.sources)
            if checkpoint is not None:
                reader = CheckpointReader(checkpoint)
                self.progress = load_checkpoint(reader, self.engine, config)
                check_is_of(stage, self.progress, checkpoint)
            self.blend, news = blend_from(data.train, self.progress, config)
            spikes = self.engine.spikes
            moved = checkpoint is not None and (news or moves_the_loss(checkpoint, config))
            if moved and spikes is not None and spikes.losses:
                spikes.losses.clear()
                news.append(
                    "--skip-loss-spikes looks back on losses from here on: those before are of"
                    " other data or other settings"
                )
        self.progress = begun(self.progress, stage, config)
        nothing_new = checkpoint is None or same_folder(config.run.load, config.run.save)
        self.saved_iteration = self.progress.iteration if nothing_new else None
        self.saver = Saver(config, say, [record["begin"] for record in self.progress.stages])
        self.best = None
        if config.run.keep_best:
            decides = best_set(data.held_out, config)
            folder = Path(config.run.save)
            name = None if stage is None else stage.name
            self.best = BestCheckpoint(folder, self.saver, say, decides, self.begin, name)
        self.reports = Reports(config, data, self.blend, mesh, self.saver, self.progress, stage)
        self.profiler = Profiler(config, mesh, say, self.reports.meter.pause)
        choices = [memory_path, *given.memory.unused(config.memory, config.parallel)]
        choices += given.attention.changed_by_matching(config.attention)
        choices += [*unused(given), *repeated(self.blend, self.progress, config)]
        self.reports.announce(checkpoint, self.progress, choices, news)

    def train(self) -> bool:
        """Train from where the run stands to `--train-iters`, then evaluate. Returns whether all
        that was done: a run that is asked to stop saves a checkpoint and returns early."""
        with self.lock or contextlib.nullcontext(), self.saver, self.reports.running():
            try:
                with (
                    self.profiler,
                    made_ahead(self._training_batches(), self.mesh.device) as batches,
                ):
                    self._train(self.reports.meter.timed(batches))
            except Stopped as request:
                self._end_early(str(request))
                return False
        return True

    def _train(self, batches: Iterator[Batch]) -> None:
        training, run = self.config.training, self.config.run
        self._check_stop()
        if self.progress.iteration > self.begin:
            self._evaluate_if_due(self.progress.iteration)
        self.reports.begin()
        while self.progress.iteration < training.train_iters:
            iteration = self.progress.iteration + 1
            rate = learning_rate(iteration, training)
            with self.profiler.iteration(iteration):
                result = self.engine.train_step(batches, rate)
            self.reports.meter.step()
            self._advance(iteration, result)
            self._read_results(all_but=1)  # the device may still be busy with the newest
            if self._due(iteration, run.log_interval):
                self._read_results()
                traffic = self.engine.take_traffic()
                self.reports.iterations(self.progress, rate, result, traffic)
                self.progress = dataclasses.replace(self.progress, losses=[], losses_by_source={})
            self._check_stop()
            if run.save is not None and self._due(iteration, run.save_interval):
                self._save()
            self._evaluate_if_due(iteration)

    def _training_batches(self) -> Iterator[Batch]:
        training = self.config.training
        return training_batches(
            self.blend,
            consumed_samples=next_sample(self.progress, self.config),
            global_batch_size=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_parallel_rank=self.mesh.data_parallel_rank,
            data_parallel_size=self.mesh.data_parallel_size,
            sequence_range=self.mesh.sequence_range(self.config.model.seq_length),
            masking=self.data.masking,
            documents=self.data.documents,
        )

    def _stop_before_the_building(self) -> None:
        """Raise Stopped, with all said, where the run was asked to stop while it was starting."""
        try:
            self.stop.check(self.mesh.host_group)
        except Stopped as request:
            if self.mesh.is_main:
                words = f"stopped by {request} before the training began"
                if self.config.run.save is not None:
                    leave_unfinished(self.config, words)
                say(f"{words}: the same command begins again")
            raise

    def _end_early(self, reason: str) -> None:
        """Save what there is, and say how to go on. An evaluation under way is made again then."""
        iteration, save = self.progress.iteration, self.config.run.save
        if save is not None and iteration != self.saved_iteration:
            self._save()
        self.saver.wait()
        if self.mesh.is_main and save is not None:
            leave_unfinished(self.config, f"stopped by {reason} after iteration {iteration}")
        self.reports.stopped(reason, iteration)

    def _check_stop(self) -> None:
        if self.saver.failed:
            self.stop.ask(FAILED_SAVE)
        self.stop.check(self.mesh.host_group)

    def _advance(self, iteration: int, result: StepResult) -> None:
        self._unread.append((iteration, result))
        before, samples = self.progress, self.config.training.global_batch_size
        self.progress = dataclasses.replace(
            before,
            iteration=iteration,
            consumed_samples=before.consumed_samples + samples,
            consumed_tokens=before.consumed_tokens + self.engine.tokens_per_step,
        )

    def _read_results(self, all_but: int = 0) -> None:
        """Read the results of the steps so far, but for the newest `all_but`."""
        while len(self._unread) > all_but:
            iteration, result = self._unread.popleft()
            # fp16 skips a step now and then, by design; anything else not finite is the end, which
            # DeepSpeed calls a norm of -1 where it did not look at the gradients themselves.
            norm, skips = result.grad_norm, self.config.training.precision == "fp16"
            spike = result.usual_loss is not None
            sound = skips or spike if norm is None else 0 <= norm < math.inf
            if not sound or not math.isfinite(result.loss):
                what = f"loss is {result.loss}" if sound else "gradients are not finite"
                raise UserError(
                    f"the {what} at iteration {iteration}: lower --lr or --clip-grad, and go on"
                    " from the last checkpoint with --load"
                )
            if spike:
                self.reports.spike(iteration, result)
            losses = [result.loss]
            if result.loss == 0 and self.blend.masks_loss:
                self.reports.nothing_predicted(iteration)
                losses = []
            by_source = dict(self.progress.losses_by_source)
            for name, (loss, count) in result.by_source.items():
                before = by_source.get(name, (0.0, 0.0))
                by_source[name] = before[0] + loss, before[1] + count
            self.progress = dataclasses.replace(
                self.progress,
                skipped_spikes=self.progress.skipped_spikes + spike,
                losses=[*self.progress.losses, *losses],
                losses_by_source=by_source,
            )

    def _due(self, iteration: int, interval: int) -> bool:
        return iteration % interval == 0 or iteration == self.config.training.train_iters

    def _save(self) -> None:
        self._read_results()
        with self.reports.saving():
            self.saver.wait()  # before there is a second copy in memory
            blend = self.blend.history(next_sample(self.progress, self.config)).values()
            self.progress = dataclasses.replace(self.progress, blend=blend)
            progress = progress_to_save(self.engine, self.progress)
            self.saver.save(progress, tensors_to_save(self.engine, self.config))
        self.saved_iteration = self.progress.iteration

    def _evaluate_if_due(self, iteration: int) -> None:
        at_the_end = iteration >= self.config.training.train_iters
        if at_the_end:
            for split in self.data.held_out:
                self._evaluate(iteration, split, whole=self.config.run.full_validation)
        elif iteration % self.config.run.eval_interval == 0:
            for split in validation_sets(self.data.held_out):
                self._evaluate(iteration, split, whole=False)
        for trials in self.data.tasks:
            if at_the_end or iteration % self.config.tasks.eval_task_interval == 0:
                self._read_results()
                batches = batches_of(self.engine, trials, self.mesh)
                with self._evaluating(batches, f"{trials.task} of {trials.length}") as on_batch:
                    apart = self.config.data.first_token_is_apart
                    score = evaluate_task(self.engine, trials, self.mesh, on_batch, apart)
                self.reports.task(self.progress, score)
        if self.data.prompts and (
            at_the_end or iteration % self.config.samples.sample_interval == 0
        ):
            self._read_results()
            end = self.data.tokenizer.eod
            with self.reports.meter.pause():
                tokens = continued(
                    self.engine, self.data.prompts, self.config, self.mesh, end, iteration,
                    on_token=self._check_stop,
                )  # fmt: skip
            self.reports.samples(self.progress, tokens)

    def _evaluate(self, iteration: int, split: str, whole: bool) -> None:
        stream = self.data.held_out[split]
        self._read_results()
        training, eval_iters = self.config.training, self.config.run.eval_iters
        whole = whole or eval_iters == 0
        size = {
            "num_samples": None if whole else eval_iters * training.global_batch_size,
            "micro_batch_size": training.micro_batch_size,
            "data_parallel_size": self.mesh.data_parallel_size,
            "masking": self.data.masking,
        }
        batches = evaluation_batches(
            stream,
            data_parallel_rank=self.mesh.data_parallel_rank,
            sequence_range=self.mesh.sequence_range(self.config.model.seq_length),
            documents=self.data.documents,
            **size,
        )
        with (
            made_ahead(batches, self.mesh.device) as ahead,
            self._evaluating(num_evaluation_batches(stream, **size), split) as on_batch,
        ):
            result = evaluate(self.engine, ahead, self.data.token_bytes, self.mesh, on_batch)
        self.reports.evaluation(self.progress, split, result)
        if self.best is not None and iteration == self.saved_iteration:
            self.best.evaluated(iteration, split, result)

    @contextlib.contextmanager
    def _evaluating(self, batches: int, what: str) -> Iterator[Callable[[], None]]:
        """Inside, the meter is paused; what is yielded is to be called after each batch."""
        words, shows = f"evaluating on {what}", self.mesh.is_main
        with progress_bar(batches, "batch", words, interval=30.0, enabled=shows) as bar:

            def on_batch() -> None:
                bar.update()
                self._check_stop()

            with self.reports.meter.pause():
                yield on_batch


@dataclasses.dataclass(frozen=True)
class Beginning:
    """All that has to be there before a stage is trained."""

    stage: Stage
    data: RunData
    checkpoint: Path | None

    @classmethod
    def of(cls, stage: Stage, data: RunData) -> Beginning:
        """That of the stage with which this start of a run begins. Raises UserError."""
        config, checkpoint = starting_point(stage.config, stage)
        make_orders(data.train, checkpoint, config)
        return cls(dataclasses.replace(stage, config=config), data, checkpoint)

    @classmethod
    def after(cls, before: Beginning, stage: Stage, saved: bool) -> Beginning:
        """Return that of the next stage. saved: whether the one before has left a checkpoint; else
        there was nothing to train any more, and its own is gone on from."""
        run, checkpoint = before.stage.config.run, before.checkpoint
        stage = stage.following(run.save if saved else run.load)
        if saved:
            checkpoint = checkpoint_folder(Path(str(run.save)), stage.begin)
        data = open_run_data(stage.config)
        make_orders(data.train, checkpoint, stage.config)
        return cls(stage, data, checkpoint)


def checked_data(stage: Stage, world_size: int) -> RunData:
    """Open what a stage reads. Raises UserError where it cannot run on this machine."""
    config = stage.config
    with stage.settings.errors():
        check_backend(config)
        deepspeed_config(config, config.parallel.data_parallel_size(world_size))
        return open_run_data(config)


def train_stages(
    beginning: Beginning, later: Sequence[Stage], request: Callable[[], StopRequest]
) -> None:
    """Join the processes of this launch, and train a stage and those after it, each from the
    checkpoint that the one before has left, until one is asked to stop, as `request` tells."""
    minutes = beginning.stage.config.run.distributed_timeout_minutes
    with process_group(minutes) as device, contextlib.ExitStack() as held:
        stop = None
        for following in [*later, None]:
            mesh_of = build_mesh if following is None else temporary_mesh
            config = beginning.stage.config
            with mesh_of(config, device) as mesh, watch_ranks(mesh, config.run):
                if stop is None:
                    stop = held.enter_context(request())
                try:
                    trainer = Trainer(
                        config, beginning.stage.given, beginning.data, beginning.checkpoint, mesh,
                        stop, beginning.stage,
                    )  # fmt: skip
                except Stopped:  # all is said
                    return
                if not trainer.train() or following is None:
                    return
                trainer.engine.destroy()
                saved = trainer.saved_iteration is not None
                del trainer
            if device.type == "cuda":
                torch.cuda.empty_cache()
            beginning = Beginning.after(beginning, following, saved)
