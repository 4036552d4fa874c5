"""Evaluate a model while it is trained, in every layout: held-out loss, tasks, sample texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from megalong.config import Config
from megalong.data.batches import IGNORE_INDEX, Batch, made_ahead, starts_behind_first
from megalong.evals.scores import AnswerSums, PositionLosses, TaskScore, perplexity, position_edges
from megalong.evals.trials import Trials, num_task_batches, task_batches
from megalong.model.output import NextTokens
from megalong.parallel.mesh import Mesh
from megalong.training.engine import TrainingEngine
from megalong.training.run_data import Prompt


@dataclass(frozen=True)
class Evaluation:
    """Held-out losses, in nats per token.

    tokens: predictions that counted.
    bits_per_byte: bits of all predictions / bytes of text that the predicted tokens stand for
        (an end of a document stands for none). None where there are no bytes.
    loss_by_position: mean loss in each bucket of `position_edges`, None where a bucket is empty;
        from the beginning of the sequence, or of the document where these are kept apart.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None
    loss_by_position: list[float | None]

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def evaluate(
    engine: TrainingEngine,
    batches: Iterable[Batch],
    token_bytes: np.ndarray,
    mesh: Mesh,
    on_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Evaluate on this rank's micro batches and reduce over all ranks: each gets the result.

    batches: every rank gives equally many. token_bytes: UTF-8 bytes of each token id.
    on_batch: called after each micro batch.
    """
    bytes_of_token = torch.as_tensor(token_bytes, dtype=torch.float64, device=mesh.device)
    losses_by_position = PositionLosses(position_edges(engine.seq_length), mesh.device)
    total_bytes = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    remaining = iter(batches)
    # As many at a time as fill the pipeline.
    while some := list(islice(remaining, mesh.pipeline_parallel_size)):
        # Stages before the last have no losses, and come here to pass activations on.
        for batch, (losses, mask) in zip(some, engine.token_losses(some), strict=False):
            places = batch["positions"] - batch.get("document_start", 0)
            losses_by_position.add(places, losses, mask)
            labels = batch["labels"].to(mesh.device, non_blocking=True)
            # Not labels[mask]: how many there are, the host would have to wait for.
            total_bytes += (bytes_of_token[labels.clamp(min=0)] * mask).sum()
        for _ in some:
            on_batch()
    for tensor in (losses_by_position.sums, losses_by_position.counts, total_bytes):
        mesh.sum_of_losses(tensor)
    bits, size = losses_by_position.total / math.log(2), total_bytes.item()
    return Evaluation(
        loss=losses_by_position.mean,
        tokens=losses_by_position.tokens,
        bits_per_byte=bits / size if size else None,
        loss_by_position=losses_by_position.by_position,
    )


def evaluate_task(
    engine: TrainingEngine,
    trials: Trials,
    mesh: Mesh,
    on_batch: Callable[[], None] = lambda: None,
    first_apart: bool = False,
) -> TaskScore:
    """Score the model on these samples, on every rank. Called by all ranks alike."""
    sums = AnswerSums(trials, mesh.device)
    batches = task_batches(
        trials,
        sums,
        micro_batch_size=engine.micro_batch_size,
        data_parallel_rank=mesh.data_parallel_rank,
        data_parallel_size=mesh.data_parallel_size,
        sequence_range=mesh.sequence_range(engine.seq_length),
        first_apart=first_apart,
    )
    with made_ahead(batches, mesh.device) as ahead:
        # As many at a time as fill the pipeline.
        while some := list(islice(ahead, mesh.pipeline_parallel_size)):
            # Stages before the last have no scores.
            for batch, (losses, right, _) in zip(some, engine.token_scores(some), strict=False):
                rows = batch["answer"].to(mesh.device, non_blocking=True)
                sums.add(rows, right, losses)
            for _ in some:
                on_batch()
    mesh.sum_of_losses(sums.sums)
    return sums.score()


def batches_of(engine: TrainingEngine, trials: Trials, mesh: Mesh) -> int:
    """Return how often `evaluate_task` calls `on_batch`."""
    return num_task_batches(trials, engine.micro_batch_size, mesh.data_parallel_size)


def continued(
    engine: TrainingEngine,
    prompts: Sequence[Prompt],
    config: Config,
    mesh: Mesh,
    end: int,
    iteration: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Continue each prompt token by token, by forward passes over the whole sequence; on every
    rank at most `--sample-tokens`, the last one `end` where the model ends the document before."""
    samples = config.samples
    texts = [list(prompt.tokens) for prompt in prompts]
    together = engine.micro_batch_size * mesh.data_parallel_size
    beside = {}
    if config.data.first_token_is_apart:
        start, stop = mesh.sequence_range(engine.seq_length)
        beside["document_start"] = starts_behind_first(engine.micro_batch_size, start, stop)
    for start in range(0, len(prompts), together):
        numbers = range(start, min(start + together, len(prompts)))
        first = start + mesh.data_parallel_rank * engine.micro_batch_size
        mine = range(first, min(first + engine.micro_batch_size, len(prompts)))
        going_on = set(numbers)
        for _ in range(samples.sample_tokens):
            batch = _batch([texts[number] for number in mine], engine, mesh) | beside
            places = [len(texts[number]) - 1 for number in mine]
            seeds = [
                _seed(config.training.seed, iteration, number, place)
                for number, place in zip(mine, places, strict=True)
            ]
            begin, stop = mesh.sequence_range(engine.seq_length)
            rows = [place - begin if begin <= place < stop else None for place in places]
            empty = engine.micro_batch_size - len(rows)
            wanted = NextTokens(
                (*rows, *[None] * empty), samples.sample_temperature, (*seeds, *[0] * empty)
            )
            tokens = engine.next_tokens(batch, wanted)
            of_all = torch.zeros(len(prompts), dtype=torch.int64, device=mesh.device)
            if tokens is not None and mine:
                of_all[mine.start : mine.stop] = tokens[: len(mine)].clamp(min=0)
            mesh.sum_of_losses(of_all)
            for number, token in enumerate(of_all.tolist()):
                if number in going_on:
                    texts[number].append(token)
                    going_on -= {number} if token == end else set()
            on_token()
            if not going_on:
                break
    return [text[len(p.tokens) :] for text, p in zip(texts, prompts, strict=True)]


def _batch(texts: Sequence[Sequence[int]], engine: TrainingEngine, mesh: Mesh) -> Batch:
    """This rank's part of a micro batch of texts, each at the beginning of a sequence; behind it,
    and in rows without one, are zeros, which causal attention keeps from it."""
    start, stop = mesh.sequence_range(engine.seq_length)
    tokens = torch.zeros(engine.micro_batch_size, stop - start, dtype=torch.int64)
    for row, text in enumerate(texts):
        part = torch.tensor(text[start:stop], dtype=torch.int64)
        tokens[row, : len(part)] = part
    return {
        "tokens": tokens,
        "labels": torch.full_like(tokens, IGNORE_INDEX),
        "positions": torch.arange(start, stop),
    }


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
