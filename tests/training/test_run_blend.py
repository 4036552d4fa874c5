"""Where in its blend a run goes on, and that the orders for that are made before ranks wait."""

from pathlib import Path

import numpy as np
import pytest

from megalong.checkpoint.content import Progress
from megalong.config.arguments import parse_arguments
from megalong.data import document_order
from megalong.data.preprocessing.writer import DocumentWriter
from megalong.training import stages
from megalong.training.run_data import open_run_data
from megalong.training.stages import blend_from, make_orders
from tests.launching import small_run_flags

AT = 100  # the sample it goes on with, in a later epoch of both sources


def write(prefix, documents: int):
    with DocumentWriter(str(prefix), np.uint16) as writer:
        writer.add(np.full(documents * 50, 65, np.uint16), [50] * documents)
        writer.commit({})


@pytest.mark.parametrize("mode", ["stream", "document"])
def test_the_orders_made_are_those_that_the_run_begins_with(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(document_order, "LARGE", 1)
    for name, documents in (("code", 40), ("books", 30)):
        write(tmp_path / name, documents)
    cache = tmp_path / "cache"
    flags = small_run_flags(
        f"0.7 {tmp_path}/code 0.3 {tmp_path}/books",
        split="1,0,0", sample_mode=mode, data_cache_path=cache,
    )  # fmt: skip
    config = parse_arguments(flags).resolve(1)
    blend = open_run_data(config).train
    seen = set()

    def new() -> int:
        made = {*cache.glob("*.npy")} - seen
        seen.update(made)
        return len(made)

    assert new() == 0
    make_orders(blend, None, config)
    assert new() == 2  # the first epoch of each
    progress = Progress(consumed_tokens=AT * 128, blend=blend.history(AT).values())
    monkeypatch.setattr(stages, "read_progress", lambda checkpoint: progress)
    make_orders(blend, Path("checkpoint"), config)
    assert new() == 2
    resumed, news = blend_from(blend, progress, config)
    samples = [resumed.sample(i).tolist() for i in range(AT, AT + 3)]
    assert not news and {resumed.source(i) for i in range(AT, AT + 3)} == {0, 1}
    assert new() == 0
    assert samples == [blend.sample(i).tolist() for i in range(AT, AT + 3)]
