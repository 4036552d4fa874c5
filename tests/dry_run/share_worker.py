"""A training step of every rank's share, rehearsed until all have the others' true rows, beside one
of a single process. Writes {case: [differences of a round, for each round]} as JSON to the file it
is given: of the loss of every token, of the mean loss, and of all gradients, which are sums of
those of all ranks, as a part of the largest number."""

import json
import sys
from pathlib import Path

import torch

from megalong.config.arguments import config_from_values
from megalong.dry_run.share import numbered_batches, share
from megalong.model.build import build_model
from megalong.training.engine import TrainingEngine
from tests.dry_run.rehearsal import Rehearsal

VOCABULARY = 97
LAYERS = 2
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "make_vocab_size_divisible_by": 1,
    "seq_length": 256,
    "micro_batch_size": 1,
    "global_batch_size": 2,
    "precision": "fp32",
    "tile_size": 16,
    "loss_chunk_size": 16,
    "data_path": "unread",
    "tokenizer_type": "ByteTokenizer",
}
GATHERED = {"segment_lengths": (32, 64, 256), "dilation_rates": (1, 2, 8)}
SENT = {"segment_lengths": (24, 150, 256), "dilation_rates": (1, 3, 80)}
CASES = {
    "gathered rows, memory path off": (4, {**GATHERED, "memory_path": "off"}),
    "gathered rows, memory path on": (4, {**GATHERED, "memory_path": "on"}),
    "rows sent one by one, groups of heads": (
        4,
        {**SENT, "memory_path": "on", "attention_head_groups": 2},
    ),
    "local and sparse": (
        2,
        {"attention": ("local", "sparse"), "window_size": 40, "sparse_block_size": 64},
    ),
}


def step(values: dict, rank: int, ranks: int, neighbours):
    """Token losses before a step, its mean loss and the gradients of this rank."""
    config = config_from_values({**values, "sequence_parallel_size": ranks}).resolve(ranks)
    with share(config, rank, ranks, neighbours) as mesh:
        model = build_model(config, VOCABULARY, mesh)
        gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.register_hook(gradients[name].add_)
        engine = TrainingEngine(model, config, mesh)
        batches = numbered_batches(config, VOCABULARY, mesh)
        [(losses, _)] = engine.token_losses([next(batches)])
        result = engine.train_step(batches, 0.0)
        engine.deepspeed.destroy()
    return losses, result.loss, gradients


def rehearsed(values: dict, ranks: int):
    """Yield what `step` returns of all ranks, put together, round after round."""
    rehearsal = Rehearsal()
    for _ in range(2 * LAYERS + 1):  # each layer waits for the one before, both ways
        found = [step(values, rank, ranks, rehearsal.of(rank)) for rank in range(ranks)]
        rehearsal.next_round()
        losses, means, gradients = zip(*found, strict=True)
        sums = {name: sum(of_rank[name] for of_rank in gradients) for name in gradients[0]}
        yield torch.cat(losses, 1), sum(means), sums


def differences(one, two) -> list[float]:
    (losses, mean, gradients), (their_losses, their_mean, theirs) = one, two
    of_gradients = (
        (gradients[name] - theirs[name]).abs().max() / theirs[name].abs().max() for name in theirs
    )
    of_losses = (losses - their_losses).abs().max()
    return [of_losses.item(), abs(mean - their_mean), max(x.item() for x in of_gradients)]


def main(output: str) -> None:
    results = {}
    for name, (ranks, flags) in CASES.items():
        whole = step(MODEL | flags, 0, 1, Rehearsal().of(0))
        results[name] = [differences(found, whole) for found in rehearsed(MODEL | flags, ranks)]
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
