"""`best` follows the lowest validation loss, over restarts too."""

import json
import math
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megalong.checkpoint.folder import best
from megalong.training.run_folder import BestCheckpoint


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_lowest_loss_is_best(one_rank, tmp_path):
    said, records, saver = [], [], SimpleNamespace(wait=lambda: None)
    keeper = BestCheckpoint(tmp_path, saver, said.append)
    # iteration, loss, tokens, the best afterwards
    for iteration, loss, tokens, expected in (
        (1, 3.0, 100, 1),
        (2, 2.0, 100, 2),
        (2, 2.0, 100, 2),  # made again
        (3, 2.5, 100, 2),
        (4, 2.6, 200, 4),  # on other tokens: it cannot be compared, and is the first of its kind
        (5, 2.5, 200, 5),
        (6, math.nan, 200, 5),
        (7, math.nan, 100, 5),
    ):
        (tmp_path / f"iter_{iteration:07d}").mkdir(exist_ok=True)
        keeper.evaluated(iteration, "validation", SimpleNamespace(loss=loss, tokens=tokens))
        keeper.evaluated(iteration, "validation/code", SimpleNamespace(loss=0.0, tokens=tokens))
        assert best(tmp_path).name == f"iter_{expected:07d}"
        record = {"iteration": iteration, "split": "validation", "loss": loss, "tokens": tokens}
        records += [record, record | {"split": "test", "loss": 0.0}]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        keeper = BestCheckpoint(tmp_path, saver, said.append)  # the run is started again
    on_others = " on 200 tokens; those before were evaluated on 100"
    assert said == [
        f"{tmp_path}/iter_{iteration:07d} is the best so far{words}"
        for iteration, words in ((1, ""), (2, ""), (4, on_others), (5, ""))
    ]


def test_each_stage_has_its_own_best(one_rank, tmp_path):
    """On as many tokens, too, and over a restart; no word is about another stage."""
    said, saver = [], SimpleNamespace(wait=lambda: None)
    records = []
    for iteration, loss, stage, begin, expected in (
        (2, 3.0, "short", 0, 2),
        (3, 2.0, "short", 0, 3),
        (4, 2.5, "long", 3, 4),
        (5, 2.6, "long", 3, 4),
        (6, 2.4, "long", 3, 6),
    ):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
        keeper = BestCheckpoint(tmp_path, saver, said.append, "validation", begin, stage)
        keeper.evaluated(iteration, "validation", SimpleNamespace(loss=loss, tokens=100))
        assert best(tmp_path).name == f"iter_{expected:07d}"
        record = {"iteration": iteration, "split": "validation", "loss": loss, "tokens": 100}
        records.append(json.dumps(record) + "\n")
        (tmp_path / "metrics.jsonl").write_text("".join(records))
    assert said == [
        f"{tmp_path}/iter_{iteration:07d} is the best of stage {stage} so far"
        for iteration, stage in ((2, "short"), (3, "short"), (4, "long"), (6, "long"))
    ]
