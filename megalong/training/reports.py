"""All that a run says: announcements and log lines on the terminal, records in its metrics."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.checkpoint.progress import Progress
from megalong.checkpoint.saving import Saver
from megalong.config import Config
from megalong.config.rope import scaling_oddities
from megalong.config.stages import Stage
from megalong.data.blend import Blend, shown_shares
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.evals.position_losses import FEW_TOKENS, position_edges
from megalong.evals.scores import TaskScore
from megalong.model.build import DTYPES
from megalong.model.flops import peak_flops, step_flops
from megalong.model.parameters import count_parameters
from megalong.parallel.mesh import Mesh
from megalong.training.changes import other_ways
from megalong.training.evaluation import Evaluation
from megalong.training.meter import Meter
from megalong.training.metrics import MetricsLog
from megalong.training.run_data import RunData, describe_training
from megalong.training.sample_prompts import Prompt
from megalong.training.step_result import StepResult
from megalong.utils.errors import counted
from megalong.utils.progress import clock, human_bytes, human_flops

SOURCES_SHOWN = 6  # in a log line; all are in the metrics
WORTH_A_WORD = 0.05  # waiting for data, and growth of the peak memory, as a share, in the log line


class Reports:
    """What a run says of itself, and the meter that it takes its numbers from. Every rank has one,
    and the main process speaks.

    blend: what is trained on. progress: where the run begins. saver: asked when a checkpoint was on
    the disk. stage: which one of several this is, if so.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        blend: Blend,
        mesh: Mesh,
        saver: Saver,
        progress: Progress,
        stage: Stage | None = None,
    ) -> None:
        self.stage = stage if stage is not None and stage.name is not None else None
        self.config, self.mesh, self.saver, self.blend = config, mesh, saver, blend
        self.meter = Meter(mesh.device)
        self.tokens_per_step = config.training.global_batch_size * config.model.seq_length
        self.parameters = count_parameters(config.model, data.tokenizer.vocab_size)
        self.masking = data.masking
        share = 1.0 if data.masking is None else data.masking.rate
        self.held_out = {
            split: round(share * part.tokens_per_epoch) for split, part in data.held_out.items()
        }
        self.oddities = [
            *config.attention.oddities(config.model.seq_length),
            *scaling_oddities(config.model),
            *data.oddities,
        ]
        self.flops = step_flops(config, data.tokenizer.vocab_size)
        self.dense_flops = step_flops(config, data.tokenizer.vocab_size, dense=True)
        self.peak, self.peak_source = _peak_of_all_ranks(config, mesh)
        self.metrics = MetricsLog(config, progress.iteration, say) if mesh.is_main else None
        self._first_iteration, self._begin = progress.iteration, time.perf_counter()
        self._says_flops = True  # in the first record
        self._said_peak = False  # that it is too low
        self._memory_before = 0  # the least peak since one was said

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, there is something to report; at the end, the metrics are closed."""
        with contextlib.nullcontext() if self.metrics is None else self.metrics:
            yield

    def begin(self) -> None:
        """The training begins now, after all that had to be built."""
        self._begin = time.perf_counter()
        self.meter.restart()

    def announce(
        self, checkpoint: Path | None, progress: Progress, choices: list[str], news: list[str]
    ) -> None:
        """What is about to run. checkpoint: what the run goes on from, or None. choices: lines on
        what was chosen by itself. news: on what is other about the training data than before the
        checkpoint.
        """
        if not self.mesh.is_main:
            return
        config, mesh = self.config, self.mesh
        training = config.training
        say(
            f"{self.parameters}, {training.precision}, on"
            f" {counted(mesh.world_size, f'{mesh.device.type} rank')}:"
            f" sequence {mesh.sequence.size} x tensor {mesh.tensor_parallel_size}"
            f" x pipeline {mesh.pipeline_parallel_size} x data {mesh.data_parallel_size},"
            f" ZeRO {config.parallel.zero_stage}"
        )
        say(config.attention.description + ("" if training.causal else ", bidirectional"))
        for line in self.stage.notes if self.stage else ():
            say(line)
        say(
            f"{self._which_iterations} of {counted(training.global_batch_size, 'sequence')} of"
            f" {config.model.seq_length:,} tokens; one epoch is"
            f" {self.blend.tokens_per_epoch:,} tokens"
        )
        if len(self.blend.sources) > 1:
            sources = counted(len(self.blend.sources), "source")
            say(f"{sources}, by their shares: {shown_shares(self.blend.shares)}")
        for line in describe_training(self.blend, config):
            say(line)
        if self.masking is not None:
            say(
                f"masked-language modelling: {self.masking.rate:.3g} of the tokens are masked; the"
                f" mask token has id {self.masking.mask}"
            )
        total, dense = sum(self.flops.values()), sum(self.dense_flops.values())
        parts = ", ".join(
            f"{part.replace('_', ' ')} {flops / total:.0%}" for part, flops in self.flops.items()
        )
        say(
            f"{human_flops(total)} an iteration ({parts}), with dense attention"
            f" {human_flops(dense)}; peak of {counted(mesh.world_size, 'rank')}"
            f" {human_flops(self.peak)}/s ({self.peak_source})"
        )
        for line in choices:
            say(line)
        if checkpoint is not None:
            new_stage = self.stage is not None and progress.iteration == self.stage.begin > 0
            how = f"stage {self.stage.name} begins with" if new_stage else _how_it_begins(config)
            say(f"{how} {checkpoint}")
            for line in [*other_ways(checkpoint, config, new_stage), *news]:
                say(line)
        elif config.run.load is not None:
            say(f"no checkpoint in {config.run.load} yet: starting at the beginning")
        if config.run.profile and progress.iteration >= config.run.profile_step_end - 1:
            say(f"--profile: the run is past iteration {config.run.profile_step_end - 1} already")
        for line in self.oddities:
            say(line)
        divides = f"--split {config.data.split} leaves" if config.data.divided else "there is"
        if not self.held_out:
            say(f"{divides} no document to evaluate on")
        for split, tokens in self.held_out.items():
            if tokens < FEW_TOKENS:
                say(
                    f"{divides} only {tokens:,} {self._predicted} for {split}: below"
                    f" {FEW_TOKENS:,} chance alone moves its perplexity by some percent"
                )
        if config.tasks.eval_tasks is not None:
            say(config.tasks.description(config.model.seq_length))
        if config.run.save is None:
            say("without --save nothing is kept")
        if progress.iteration >= training.train_iters:
            done = f"--train-iters {training.train_iters} are"
            if self.stage is not None:
                done = f"stage {self.stage.name} is"
            say(f"{done} done: evaluating only")

    def iterations(
        self,
        progress: Progress,
        learning_rate: float,
        result: StepResult,
        traffic: dict[str, Any] | None,
    ) -> None:
        """The iterations since the last report. progress: their losses, and where the run stands;
        result: of the last of them. traffic: of a step, where it was counted."""
        seconds, data_share = self.meter.take()
        if not self.mesh.is_main:
            return
        total, dense = sum(self.flops.values()), sum(self.dense_flops.values())
        record = {
            **self._place(progress),
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "loss": sum(progress.losses) / max(len(progress.losses), 1),  # none: nothing to predict
            **({} if result.z_loss is None else {"z_loss": result.z_loss}),
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self.tokens_per_step / seconds,
            "mfu": total / seconds / self.peak,
            "mfu_dense_equivalent": dense / seconds / self.peak,
            "data_share": data_share,
            **self.meter.take_memory(),
            **self.meter.take_save(self.saver.durable_at),
        }
        if self.config.training.skip_loss_spikes is not None:
            record["skipped_spikes"] = progress.skipped_spikes
        if len(self.blend.sources) > 1:
            record["sources"] = self._sources(progress)
        if self._says_flops:
            record["flops"] = {
                "per_step": self.flops,
                "dense_equivalent": dense,
                "peak_per_second": self.peak,
                "peak_source": self.peak_source,
            }
            self._says_flops = False
        if traffic:
            record["traffic"] = traffic
        self.metrics.training(record)
        say(self._line(record))
        if record["mfu"] > 1 and not self._said_peak:
            self._said_peak = True
            say(f"MFU above 100%: the peak ({self.peak_source}) is too low; --peak-tflops sets it")

    def nothing_predicted(self, iteration: int) -> None:
        """A step of whose tokens none counts in the loss."""
        if self.mesh.is_main:
            say(
                f"iteration {iteration}: no token of its batch counts in the loss, by the loss"
                " masks of the data: the loss and its gradients are 0"
            )

    def spike(self, iteration: int, result: StepResult) -> None:
        """A step whose update was left out, for its loss."""
        if self.mesh.is_main:
            say(
                f"iteration {iteration}: the loss is {result.loss:.4f}, more than"
                f" {self.config.training.skip_loss_spikes:g} times the usual"
                f" {result.usual_loss:.4f}: no update is made (--skip-loss-spikes)"
            )

    @property
    def _which_iterations(self) -> str:
        """Those of the run, or of its stage, in words."""
        stage = self.stage
        if stage is None:
            return counted(self.config.training.train_iters, "iteration")
        return (
            f"stage {stage.name}, {stage.number} of {stage.count}: iterations {stage.begin + 1:,}"
            f" to {stage.end:,},"
        )

    def _place(self, progress: Progress) -> dict[str, Any]:
        """Where a run stands, in a record of its metrics."""
        stage = {} if self.stage is None else {"stage": self.stage.name}
        return {"iteration": progress.iteration, **stage}

    def _sources(self, progress: Progress) -> dict[str, dict[str, float | None]]:
        """Of each source of the training data the mean loss since the last report (None: it had no
        sample), its share of the samples so far, and how many epochs of it were read."""
        sums = progress.losses_by_source
        read = -(-progress.consumed_tokens // self.config.model.seq_length)
        found = {}
        for name, (share, epochs) in self.blend.realised(read).items():
            total, count = sums.get(name, (0.0, 0.0))
            loss = total / count if count else None
            found[name] = {"loss": loss, "share": share, "epochs": epochs}
        return found

    def _line(self, record: dict[str, Any]) -> str:
        """The log line of a training record: what one looks at, and what is out of the ordinary."""
        iteration, train_iters = record["iteration"], self.config.training.train_iters
        stage = self.stage
        pace = (time.perf_counter() - self._begin) / (iteration - self._first_iteration)
        norm = "skipped" if record["grad_norm"] is None else f"{record['grad_norm']:.3f}"
        mfu = f"MFU {record['mfu']:.1%}"
        if record["mfu_dense_equivalent"] != record["mfu"]:
            mfu += f" (dense equivalent {record['mfu_dense_equivalent']:.1%})"
        words = [
            *([f"stage {stage.name} ({stage.number} of {stage.count})"] if stage else []),
            f"iteration {iteration}/{train_iters}",
            f"loss {record['loss']:.4f}{_by_source(record.get('sources', {}))}",
            *([f"z-loss {record['z_loss']:.2e}"] if "z_loss" in record else []),
            f"lr {record['learning_rate']:.3e}",
            f"grad norm {norm}",
            f"{record['tokens_per_second']:,.0f} tokens/s",
            mfu,
        ]
        if record["data_share"] > WORTH_A_WORD:
            words.append(f"waiting for data {record['data_share']:.0%}")
        memory = record["peak_memory_bytes"]
        if memory > (1 + WORTH_A_WORD) * self._memory_before:
            self._memory_before = memory
            words.append(f"peak memory {human_bytes(memory)}")
        self._memory_before = min(self._memory_before, memory)
        words += self._words_on_save(record)
        words.append(f"{clock(pace * (train_iters - iteration))} left")
        return " | ".join(words)

    def evaluation(self, progress: Progress, split: str, result: Evaluation) -> None:
        """An evaluation of one split."""
        if not self.mesh.is_main:
            return
        self.metrics.evaluation(
            {
                **self._place(progress),
                "split": split,
                "consumed_tokens": progress.consumed_tokens,
                "loss": result.loss,
                "perplexity": result.perplexity,
                "bits_per_byte": result.bits_per_byte,
                "tokens": result.tokens,
                "position_edges": position_edges(self.config.model.seq_length),
                "loss_by_position": result.loss_by_position,
                **(saved := self.meter.take_save(self.saver.durable_at)),
            }
        )
        words = [
            f"{split} at iteration {progress.iteration}",
            f"loss {result.loss:.4f}",
            f"perplexity {result.perplexity:.2f}",
            f"{result.tokens:,} {self._predicted}",
        ]
        if result.bits_per_byte is not None:
            words.insert(-1, f"{result.bits_per_byte:.3f} bits per byte")
        say(" | ".join(words + self._words_on_save(saved)))

    def task(self, progress: Progress, score: TaskScore) -> None:
        """An evaluation of one task at one length."""
        if not self.mesh.is_main:
            return
        self.metrics.task(
            {
                **self._place(progress),
                "consumed_tokens": progress.consumed_tokens,
                "style": self.config.tasks.eval_task_style,
                **score.record(),
                **(saved := self.meter.take_save(self.saver.durable_at)),
            }
        )
        words = [
            f"{score.task} of {score.length:,} tokens at iteration {progress.iteration}",
            f"{score.accuracy:.1%} of {counted(score.answers, 'answer')} right",
            f"{score.token_accuracy:.1%} of their tokens",
            f"loss {score.loss:.4f}",
        ]
        say(" | ".join(words + self._words_on_save(saved)))

    def samples(
        self,
        progress: Progress,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[int]],
        tokenizer: Tokenizer,
    ) -> None:
        """What the model made of the prompts: tokens of each."""
        if not self.mesh.is_main:
            return
        for number, (prompt, tokens) in enumerate(zip(prompts, continuations, strict=True)):
            text = tokenizer.decode(tokens)
            self.metrics.sample(
                {
                    **self._place(progress),
                    "consumed_tokens": progress.consumed_tokens,
                    "number": number,
                    "prompt": prompt.text,
                    "text": text,
                    "tokens": list(tokens),
                    "ended": tokens[-1] == tokenizer.eod,
                }
            )
            say(f"sample at iteration {progress.iteration} | {prompt.text!r} | {text!r}")

    @property
    def _predicted(self) -> str:
        """What is predicted, in words."""
        return "tokens" if self.masking is None else "masked tokens"

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, a checkpoint is saved, or copied to be written in the background."""
        if self.metrics is not None:
            self.metrics.make_durable()
        with self.meter.saving():
            yield

    def _words_on_save(self, record: dict[str, Any]) -> list[str]:
        if "save_seconds" not in record:
            return []
        words = f"saved in {record['save_seconds']:.1f} s"
        if self.config.run.async_save:
            words += f" ({record['save_blocking_seconds']:.1f} s waited)"
        return [words]

    def stopped(self, reason: str, iteration: int) -> None:
        """A run that was asked to stop has done so, after this iteration."""
        if not self.mesh.is_main:
            return
        run = self.config.run
        if run.save is None:
            then = "without --save nothing is kept"
        else:
            anew = run.finetune and run.pretrained_checkpoint is None
            flags = f"--load {run.save}" + (" and without --finetune" if anew else "")
            then = f"the same command with {flags} goes on from there"
        say(f"stopped by {reason} after iteration {iteration}; {then}")


def say(line: str) -> None:
    """One line to the terminal, at once. A run goes on where what read its lines has ended."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _by_source(sources: dict[str, dict[str, float | None]]) -> str:
    """(code 2.1034, books 3.2215), behind a loss."""
    losses = [(name, its["loss"]) for name, its in sources.items()]
    words = [f"{name} {loss:.4f}" for name, loss in losses if loss is not None]
    shown = ", ".join(words[:SOURCES_SHOWN]) + (", ..." if len(words) > SOURCES_SHOWN else "")
    return f" ({shown})" if words else ""


def _how_it_begins(config: Config) -> str:
    if config.run.finetune:
        return "a new run, with the weights of"
    left_out = {"--no-load-optim": config.run.load_optim, "--no-load-rng": config.run.load_rng}
    flags = " ".join(flag for flag, loaded in left_out.items() if not loaded)
    return f"resuming ({flags}) from" if flags else "resuming from"


def _peak_of_all_ranks(config: Config, mesh: Mesh) -> tuple[float, str]:
    """Peak FLOP/s of the devices of all ranks together, and where that is from."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops * 1e12 * mesh.world_size, "--peak-tflops"
    peak, source = peak_flops(mesh.device, DTYPES[config.training.precision])
    total = torch.tensor(peak, dtype=torch.float64, device=mesh.device)
    dist.all_reduce(total)
    return total.item(), source
