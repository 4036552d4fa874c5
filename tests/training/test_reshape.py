"""Any layout saves and any other goes on, as if one process had done it all."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from megalong.checkpoint.folder import latest
from megalong.checkpoint.reading import CheckpointReader
from megalong.training.metrics import read_metrics
from tests.forked import run_ranks
from tests.launching import made_once
from tests.training.reshape_worker import LAYOUTS, pairs

WORKER = __file__.replace("test_reshape", "reshape_worker")


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    def make(folder: Path) -> None:
        # Each number of ranks saves before any other loads.
        for ranks, *what in (
            (1, "save"),
            (2, "save"),
            (8, "save", "load"),
            (2, "load"),
            (1, "load"),
        ):
            run_ranks(ranks, WORKER, corpus, folder, *what, timeout=900)

    return made_once(tmp_path_factory, "reshape", make)


MOMENTS = {"adam": {"exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


@pytest.mark.parametrize("optimizer, to, source", pairs(), ids=str)
def test_resumed_in_another_layout(runs, optimizer, to, source):
    whole, resumed = runs / optimizer / "whole", runs / optimizer / "resumed" / to / source
    records, expected = (
        read_metrics(resumed / "metrics.jsonl"),
        read_metrics(whole / "metrics.jsonl"),
    )
    assert [r["iteration"] for r in records] == [3, 4]
    for name in ("loss", "grad_norm", "learning_rate"):
        values, wanted = ([r[name] for r in part[-2:]] for part in (records, expected))
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=0, msg=name)
    reader, reference = (CheckpointReader(latest(folder)) for folder in (resumed, whole))
    assert reader.progress().consumed_tokens == reference.progress().consumed_tokens
    assert reader.progress().updates == 4
    assert_same_tensors(reader, reference, optimizer)


@pytest.mark.parametrize("optimizer", MOMENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_saves_the_same(runs, optimizer, layout):
    """So that what goes on from one of them goes on from all."""
    reader = CheckpointReader(latest(runs / optimizer / "saved" / layout))
    whole = CheckpointReader(runs / optimizer / "whole" / "iter_0000002")
    progress, wanted = reader.progress(), whole.progress()
    assert (progress.consumed_tokens, progress.updates) == (wanted.consumed_tokens, 2)
    assert_same_tensors(reader, whole, optimizer)


def assert_same_tensors(reader, reference, optimizer):
    names = [name for name in reference.tensors if not name.startswith("random.")]
    assert set(names) == {name for name in reader.tensors if not name.startswith("random.")}
    kinds = Counter(name.partition(".")[0] for name in names)
    assert kinds.keys() == {"weights"} | MOMENTS[optimizer] and len(set(kinds.values())) == 1
    for name in names:
        tensor, wanted = reader.read(name), reference.read(name)
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype), name
        assert (tensor - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
