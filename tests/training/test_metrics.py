"""metrics.jsonl under kills: a cut line is no line, a resumed run writes its own again."""

import json
import os
from types import SimpleNamespace

from megalong.config import Config
from megalong.config.run import RunConfig
from megalong.training.metrics import MetricsLog, forget_after, read_metrics
from tools.plot_run import HELD_OUT_COLORS, held_out_colors


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iterat')
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2}]


def test_resuming_forgets_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"iteration": 1},
        {"iteration": 1, "split": "validation"},
        {"iteration": 2},
        {"iteration": 2, "split": "validation"},
        {"iteration": 3},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"it')
    forget_after(path, 2)
    assert read_metrics(path) == records[:4]
    assert list(tmp_path.iterdir()) == [path]
    forget_after(tmp_path / "absent.jsonl", 2)
    assert list(tmp_path.iterdir()) == [path]


def test_an_evaluation_takes_the_place_of_the_same_one_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = {"iteration": 2, "split": "validation", "tokens": 99, "position_edges": [0, 4]}
    earlier = [{"iteration": 2}, whole, whole | {"tokens": 9, "loss": 2.0}]
    path.write_text("".join(json.dumps(record) + "\n" for record in earlier))
    with MetricsLog(Config(run=RunConfig(save=str(tmp_path))), 2, print) as log:
        log.evaluation(whole | {"tokens": 9, "loss": 1.0})
        log.training({"iteration": 3})
    expected = [*earlier[:2], whole | {"tokens": 9, "loss": 1.0}, {"iteration": 3}]
    assert read_metrics(path) == expected


def test_samples_are_on_the_disk_with_a_checkpoint(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    with MetricsLog(Config(run=RunConfig(save=str(tmp_path))), 0, print) as log:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file)) or fsync(file))
        log.make_durable()
        log.sample({"iteration": 1, "number": 0, "prompt": "a", "text": "b"})
        log.make_durable()
    names = ["metrics.jsonl", "metrics.jsonl", "samples.jsonl"]
    assert [found.st_ino for found in synced] == [(tmp_path / x).stat().st_ino for x in names]


def test_every_source_and_every_set_has_its_curves(tmp_path):
    points = {}
    with MetricsLog(Config(run=RunConfig(save=str(tmp_path))), 0, print) as log:
        log._boards.append(
            SimpleNamespace(
                scalars=lambda iteration, values: points.update(values), close=lambda failed: None
            )
        )
        sources = {
            "code": {"loss": 2.5, "share": 0.7, "epochs": 0.1},
            "books": {"loss": None, "share": 0.3, "epochs": 0.2},
        }
        log.training({"iteration": 1, "loss": 2.5, "sources": sources})
        log.evaluation(
            {"iteration": 1, "split": "validation/code", "loss": 3.0, "perplexity": 20.0}
        )
    assert points == {
        "train/loss": 2.5,
        "source/code/loss": 2.5,
        "source/code/share": 0.7,
        "source/code/epochs": 0.1,
        "source/books/share": 0.3,
        "source/books/epochs": 0.2,
        "validation/code/loss": 3.0,
        "validation/code/perplexity": 20.0,
    }


def test_held_out_sets_have_colors_of_their_own():
    splits = ["validation/code", "validation/books", "test", "validation/code"]
    colors = held_out_colors([{"split": split} for split in splits] + [{"loss": 1.0}])
    assert list(colors) == ["validation/code", "validation/books", "test"]
    assert colors["test"] == HELD_OUT_COLORS["test"]
    assert len(set(colors.values())) == 3
