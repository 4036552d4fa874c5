"""Texts that the model continues while it is trained: token by token, each by a forward pass of the
training's own over the whole sequence, so that it goes in every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megalong.config import Config
from megalong.data.batches import Batch, starts_behind_first
from megalong.data.masking import IGNORE_INDEX
from megalong.model.output import NextTokens
from megalong.parallel.mesh import Mesh
from megalong.training.engine import TrainingEngine
from megalong.training.sample_prompts import Prompt


def continued(
    engine: TrainingEngine,
    prompts: Sequence[Prompt],
    config: Config,
    mesh: Mesh,
    end: int,
    iteration: int,
    on_token: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, on every rank: at most `--sample-tokens`, the last one
    `end` where the model ends the document before. Called by all ranks alike.

    iteration: draws hang on it. on_token: called after each forward pass.
    """
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
            wanted = _wanted(places, seeds, engine, mesh, samples.sample_temperature)
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


def _wanted(
    places: Sequence[int],
    seeds: Sequence[int],
    engine: TrainingEngine,
    mesh: Mesh,
    temperature: float,
) -> NextTokens:
    """places: of the last tokens of the texts, in whole sequences."""
    start, stop = mesh.sequence_range(engine.seq_length)
    rows = [place - start if start <= place < stop else None for place in places]
    empty = engine.micro_batch_size - len(rows)
    return NextTokens((*rows, *[None] * empty), temperature, (*seeds, *[0] * empty))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
