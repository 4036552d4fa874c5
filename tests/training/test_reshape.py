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
from tests.training.reshape_worker import layouts_of, pairs

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
MOMENTS["muon"] = MOMENTS["adam"] | MOMENTS["sgd"]  # of each parameter its own


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
    for record, wanted in zip(records, expected[-2:], strict=True):
        assert record["sources"].keys() == {"code", "books"}
        assert_losses_of_sources(record, wanted)
    reader, reference = (CheckpointReader(latest(folder)) for folder in (resumed, whole))
    assert reader.progress().consumed_tokens == reference.progress().consumed_tokens
    assert reader.progress().updates == 4
    assert_same_tensors(reader, reference, optimizer)


def assert_losses_of_sources(record, wanted):
    """They are the same, and together, by their shares of the samples so far, the loss."""
    torch.testing.assert_close(record["sources"], wanted["sources"], rtol=1e-5, atol=0)
    # Iteration 3 has samples 8 to 11, iteration 4 those up to 15, of which 0.7 are code.
    code = {3: 8 - 6, 4: 11 - 8}[record["iteration"]]
    losses = [record["sources"][name]["loss"] for name in ("code", "books")]
    mean = (code * losses[0] + (4 - code) * losses[1]) / 4
    assert mean == pytest.approx(record["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "optimizer, layout",
    [(optimizer, layout) for optimizer in MOMENTS for layout in layouts_of(optimizer)],
)
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
    assert kinds.keys() == {"weights"} | MOMENTS[optimizer]
    if optimizer == "muon":
        momentum = {name.partition(".")[2] for name in names if name.startswith("momentum_buffer")}
        adam = {name.partition(".")[2] for name in names if name.startswith("exp_avg_sq")}
        assert not momentum & adam and len(momentum | adam) == kinds["weights"]
        assert all(".layers." in name and "norm" not in name for name in momentum)
    else:
        assert len(set(kinds.values())) == 1
    for name in names:
        tensor, wanted = reader.read(name), reference.read(name)
        assert (tensor.shape, tensor.dtype) == (wanted.shape, wanted.dtype), name
        assert (tensor - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
