"""Where in its blend a run goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megalong.checkpoint.manifest import DamagedCheckpoint
from megalong.checkpoint.progress import Progress
from megalong.checkpoint.texts import read_progress
from megalong.config import Config
from megalong.data.blend import Blend, History
from megalong.training.changes import config_of

REPEATS = 4  # epochs, after which more of the same text teaches little (arXiv 2305.16264)


def next_sample(progress: Progress, config: Config) -> int:
    """The first sample of the blend that was not trained on. A run that goes on with longer
    sequences goes on at the same place."""
    return -(-progress.consumed_tokens // config.model.seq_length)


def blend_from(
    blend: Blend, progress: Progress, checkpoint: Path | None, config: Config
) -> tuple[Blend, list[str]]:
    """What is trained on from here on, and what is new about it since the checkpoint. blend: as it
    is at the beginning of a run."""
    if not progress.consumed_tokens:
        return blend, []
    if progress.blend is not None:
        history = History.from_values(progress.blend)
    else:
        assert checkpoint is not None
        theirs = config_of(checkpoint)
        [source] = theirs.data.training_sources()
        history = History.of_one(source.name, progress.consumed_tokens, theirs.model.seq_length)
    return blend.continued(next_sample(progress, config), history)


def repeated(blend: Blend, progress: Progress, config: Config) -> list[str]:
    """The sources that a run reads more often than helps until the end of its stage, those before
    it included: a line each. blend: that from here on."""
    training, length = config.training, config.model.seq_length
    samples = (training.train_iters - progress.iteration) * training.global_batch_size
    lines = []
    for name, (_, epochs) in blend.realised(next_sample(progress, config)).items():
        tokens = blend.epoch_tokens[name]
        epochs += float(blend.shares[name]) * samples * length / tokens
        if epochs > REPEATS:
            lines.append(
                f"source {name}: {tokens:,} tokens, which are read {epochs:.1f} times until"
                f" iteration {training.train_iters}: beyond {REPEATS} times text teaches little"
            )
    return lines


def make_orders(blend: Blend, checkpoint: Path | None, config: Config) -> None:
    """Have in the cache what the run will first read of each source, if it has a cache: while
    nobody waits for this rank. blend: as it is at the beginning of a run."""
    if config.data.data_cache_path is None:
        return
    progress = Progress()
    if checkpoint is not None and not config.run.finetune:
        with contextlib.suppress(DamagedCheckpoint):  # which all ranks will find together
            progress = read_progress(checkpoint)
    blend, _ = blend_from(blend, progress, checkpoint, config)
    blend.make_orders(next_sample(progress, config))
