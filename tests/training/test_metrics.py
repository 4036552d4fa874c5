"""metrics.jsonl under kills: a cut line is no line, a resumed run writes its own again."""

import json

from megalong.training.metrics import forget_after, read_metrics


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
    assert read_metrics(path) == records[:3]
    assert list(tmp_path.iterdir()) == [path]
    forget_after(tmp_path / "absent.jsonl", 2)
    assert list(tmp_path.iterdir()) == [path]
