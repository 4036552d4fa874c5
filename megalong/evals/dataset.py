"""Datasets of samples of tasks, to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megalong.data.indexed import token_dtype
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.data.tokenizers.tokenizer import Tokenizer
from megalong.evals.sample import Sample
from megalong.evals.trials import Trials

# Which tokens of a sample count in the loss. Haystack and answers follow from what is before them,
# facts and questions do not.
LOSSES: dict[str, Callable[[Sample], np.ndarray] | None] = {
    "all": None,
    "predictable": lambda sample: sample.answered | sample.hay,
    "answers": lambda sample: sample.answered,
}
_CHUNK = 256  # samples that are written at once


def data_salt(seed: int) -> str:
    """Of `Trials`: samples to train on, drawn apart from those of evaluations."""
    return f"data {seed}"


def write_dataset(
    prefix: str,
    trials: Sequence[Trials],
    tokenizer: Tokenizer,
    description: dict,
    *,
    loss: str = "all",
    overwrite: bool = False,
    on_samples: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes PREFIX.bin, .idx and .json: the first sample of each of these trials, the second of
    each, and so on, a document each.

    loss: which tokens count, one of LOSSES; but for "all" with a PREFIX.loss
    (`megalong.data.loss_mask`). description: what PREFIX.json says besides. on_samples: hears how
    many more are written.
    Raises UserError where an output is there already and `overwrite` is not set.
    """
    dtype, counts_of = token_dtype(tokenizer.vocab_size), LOSSES[loss]
    masks = counts_of is not None
    order = [(one, i) for i in range(max(t.samples for t in trials)) for one in trials]
    order = [(one, i) for one, i in order if i < one.samples]
    with DocumentWriter(prefix, dtype, overwrite=overwrite, masks_loss=masks) as writer:
        for start in range(0, len(order), _CHUNK):
            samples = [one.sample(i) for one, i in order[start : start + _CHUNK]]
            tokens = np.concatenate([sample.tokens for sample in samples]).astype(dtype)
            counts = np.concatenate(list(map(counts_of, samples))) if masks else None
            writer.add(tokens, [len(sample.tokens) for sample in samples], counts)
            on_samples(len(samples))
        writer.commit(
            {
                "tokenizer_sha256": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
                **description,
            }
        )
