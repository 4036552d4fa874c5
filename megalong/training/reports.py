"""Report what a run does: lines on the terminal, records in its metrics."""

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

from megalong.checkpoint.content import Progress
from megalong.checkpoint.writing import Saver
from megalong.config import Config
from megalong.config.model import scaling_oddities
from megalong.config.stages import Stage
from megalong.data.blend import Blend, shown_shares
from megalong.evals.scores import FEW_TOKENS, TaskScore, position_edges
from megalong.model.build import DTYPES
from megalong.model.flops import peak_flops, step_flops
from megalong.model.parameters import count_parameters
from megalong.parallel.mesh import Mesh
from megalong.training.evaluation import Evaluation
from megalong.training.metrics import MetricsLog
from megalong.training.resuming import other_ways
from megalong.training.run_data import RunData, describe_training
from megalong.training.stages import next_sample
from megalong.training.training_loss import Meter, StepResult
from megalong.utils.errors import counted
from megalong.utils.progress import clock, human_bytes, human_flops

SOURCES_SHOWN = 6  # in a log line; all are in the metrics
WORTH_A_WORD = 0.05  # waiting for data, and growth of the peak memory, as a share, in the log line


class Reports:
    """What a run says of itself, and the meter that it takes its numbers from. Every rank has one,
    and the main process speaks."""

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
        self.config, self.data, self.blend = config, data, blend
        self.mesh, self.saver = mesh, saver
        self.meter = Meter(mesh.device)
        self.tokens_per_step = config.training.global_batch_size * config.model.seq_length
        self.flops = step_flops(config, data.tokenizer.vocab_size)
        self.total_flops = sum(self.flops.values())
        dense = step_flops(config, data.tokenizer.vocab_size, dense=True)
        self.dense_flops = sum(dense.values())
        self.peak, self.peak_source = _peak_of_all_ranks(config, mesh)
        self.metrics = MetricsLog(config, progress.iteration, say) if mesh.is_main else None
        self._first_iteration, self._begin = progress.iteration, time.perf_counter()
        self._says_flops = True  # in the first record
        self._said_peak = False  # that it is too low
        self._memory_before = 0  # the least peak since one was said
        # What is predicted, in words.
        self._predicted = "tokens" if data.masking is None else "masked tokens"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, there is something to report; at the end, the metrics are closed."""
        with contextlib.nullcontext() if self.metrics is None else self.metrics:
            yield

    def begin(self) -> None:
        """Begin to measure the training, after all that had to be built."""
        self._begin = time.perf_counter()
        self.meter.restart()

    def announce(
        self, checkpoint: Path | None, progress: Progress, choices: list[str], news: list[str]
    ) -> None:
        """Say what is about to run. choices: lines on what was chosen by itself. news: on what is
        other about the training data than before the checkpoint."""
        if self.mesh.is_main:
            for line in self._announcement(checkpoint, progress, choices, news):
                say(line)

    def _announcement(
        self, checkpoint: Path | None, progress: Progress, choices: list[str], news: list[str]
    ) -> Iterator[str]:
        config, mesh, data, stage = self.config, self.mesh, self.data, self.stage
        training, run, length = config.training, config.run, config.model.seq_length
        yield (
            f"{count_parameters(config.model, data.tokenizer.vocab_size)}, {training.precision}, on"
            f" {counted(mesh.world_size, f'{mesh.device.type} rank')}:"
            f" sequence {mesh.sequence.size} x tensor {mesh.tensor_parallel_size}"
            f" x pipeline {mesh.pipeline_parallel_size} x data {mesh.data_parallel_size},"
            f" ZeRO {config.parallel.zero_stage}"
        )
        yield config.attention.description + ("" if training.causal else ", bidirectional")
        iterations = counted(training.train_iters, "iteration")
        if stage is not None:
            yield from stage.notes
            iterations = (
                f"stage {stage.name}, {stage.number} of {stage.count}: iterations"
                f" {stage.begin + 1:,} to {stage.end:,},"
            )
        yield (
            f"{iterations} of {counted(training.global_batch_size, 'sequence')} of {length:,}"
            f" tokens; one epoch is {self.blend.tokens_per_epoch:,} tokens"
        )
        if len(self.blend.sources) > 1:
            sources = counted(len(self.blend.sources), "source")
            yield f"{sources}, by their shares: {shown_shares(self.blend.shares)}"
        yield from describe_training(self.blend, config)
        if data.masking is not None:
            yield (
                f"masked-language modelling: {data.masking.rate:.3g} of the tokens are masked; the"
                f" mask token has id {data.masking.mask}"
            )
        parts = ", ".join(
            f"{part.replace('_', ' ')} {flops / self.total_flops:.0%}"
            for part, flops in self.flops.items()
        )
        yield (
            f"{human_flops(self.total_flops)} an iteration ({parts}), with dense attention"
            f" {human_flops(self.dense_flops)}; peak of {counted(mesh.world_size, 'rank')}"
            f" {human_flops(self.peak)}/s ({self.peak_source})"
        )
        yield from choices
        if checkpoint is not None:
            new_stage = stage is not None and progress.iteration == stage.begin > 0
            how = f"stage {stage.name} begins with" if new_stage else _how_it_begins(config)
            yield f"{how} {checkpoint}"
            yield from other_ways(checkpoint, config, new_stage)
            yield from news
        elif run.load is not None:
            yield f"no checkpoint in {run.load} yet: starting at the beginning"
        if run.profile and progress.iteration >= run.profile_step_end - 1:
            yield f"--profile: the run is past iteration {run.profile_step_end - 1} already"
        yield from config.attention.oddities(length)
        yield from scaling_oddities(config.model)
        yield from data.oddities
        divides = f"--split {config.data.split} leaves" if config.data.divided else "there is"
        if not data.held_out:
            yield f"{divides} no document to evaluate on"
        share = 1.0 if data.masking is None else data.masking.rate
        for split, part in data.held_out.items():
            tokens = round(share * part.tokens_per_epoch)
            if tokens < FEW_TOKENS:
                yield (
                    f"{divides} only {tokens:,} {self._predicted} for {split}: below"
                    f" {FEW_TOKENS:,} chance alone moves its perplexity by some percent"
                )
        if config.tasks.eval_tasks is not None:
            yield config.tasks.description(length)
        if run.save is None:
            yield "without --save nothing is kept"
        if progress.iteration >= training.train_iters:
            done = f"--train-iters {training.train_iters} are"
            yield f"{done if stage is None else f'stage {stage.name} is'} done: evaluating only"

    def iterations(
        self,
        progress: Progress,
        learning_rate: float,
        result: StepResult,
        traffic: dict[str, Any] | None,
    ) -> None:
        """Report the iterations since the last report; result: of the last of them."""
        seconds, data_share = self.meter.take()
        if not self.mesh.is_main:
            return
        record = {
            **self._place(progress),
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": progress.consumed_tokens,
            "loss": sum(progress.losses) / max(len(progress.losses), 1),  # none: nothing to predict
            **({} if result.z_loss is None else {"z_loss": result.z_loss}),
            "learning_rate": learning_rate,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self.tokens_per_step / seconds,
            "mfu": self.total_flops / seconds / self.peak,
            "mfu_dense_equivalent": self.dense_flops / seconds / self.peak,
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
                "dense_equivalent": self.dense_flops,
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

    def _place(self, progress: Progress) -> dict[str, Any]:
        stage = {} if self.stage is None else {"stage": self.stage.name}
        return {"iteration": progress.iteration, **stage}

    def _sources(self, progress: Progress) -> dict[str, dict[str, float | None]]:
        """By source the mean loss since the last report (None: it had no sample), its share of the
        samples so far, and how many epochs of it were read."""
        found = {}
        read = next_sample(progress, self.config)
        for name, (share, epochs) in self.blend.realised(read).items():
            total, count = progress.losses_by_source.get(name, (0.0, 0.0))
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

    def nothing_predicted(self, iteration: int) -> None:
        """Say that of a step's tokens none counts in the loss."""
        if self.mesh.is_main:
            say(
                f"iteration {iteration}: no token of its batch counts in the loss, by the loss"
                " masks of the data: the loss and its gradients are 0"
            )

    def spike(self, iteration: int, result: StepResult) -> None:
        """Say that a step's update was left out, for its loss."""
        if self.mesh.is_main:
            say(
                f"iteration {iteration}: the loss is {result.loss:.4f}, more than"
                f" {self.config.training.skip_loss_spikes:g} times the usual"
                f" {result.usual_loss:.4f}: no update is made (--skip-loss-spikes)"
            )

    def evaluation(self, progress: Progress, split: str, result: Evaluation) -> None:
        """Report an evaluation of one split."""
        if not self.mesh.is_main:
            return
        record = {
            **self._place(progress),
            "split": split,
            "consumed_tokens": progress.consumed_tokens,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
            "position_edges": position_edges(self.config.model.seq_length),
            "loss_by_position": result.loss_by_position,
            **self.meter.take_save(self.saver.durable_at),
        }
        self.metrics.evaluation(record)
        bits = result.bits_per_byte
        words = [
            f"{split} at iteration {progress.iteration}",
            f"loss {result.loss:.4f}",
            f"perplexity {result.perplexity:.2f}",
            *([] if bits is None else [f"{bits:.3f} bits per byte"]),
            f"{result.tokens:,} {self._predicted}",
        ]
        say(" | ".join(words + self._words_on_save(record)))

    def task(self, progress: Progress, score: TaskScore) -> None:
        """Report an evaluation of one task at one length."""
        if not self.mesh.is_main:
            return
        record = {
            **self._place(progress),
            "consumed_tokens": progress.consumed_tokens,
            "style": self.config.tasks.eval_task_style,
            **score.record(),
            **self.meter.take_save(self.saver.durable_at),
        }
        self.metrics.evaluation(record)
        words = [
            f"{score.task} of {score.length:,} tokens at iteration {progress.iteration}",
            f"{score.accuracy:.1%} of {counted(score.answers, 'answer')} right",
            f"{score.token_accuracy:.1%} of their tokens",
            f"loss {score.loss:.4f}",
        ]
        say(" | ".join(words + self._words_on_save(record)))

    def samples(self, progress: Progress, continuations: Sequence[Sequence[int]]) -> None:
        """Report what the model made of the prompts: tokens of each."""
        if not self.mesh.is_main:
            return
        tokenizer, pairs = self.data.tokenizer, zip(self.data.prompts, continuations, strict=True)
        for number, (prompt, tokens) in enumerate(pairs):
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
        """Say that a run has stopped on request after this iteration, and how to go on."""
        if not self.mesh.is_main:
            return
        run = self.config.run
        then = "without --save nothing is kept"
        if run.save is not None:
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
