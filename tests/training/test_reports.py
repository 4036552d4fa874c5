"""What a run says of itself: utilisation, memory, waiting, saves, a trace, curves."""

import contextlib
import gzip
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalong.config import Config
from megalong.config.arguments import parse_arguments
from megalong.config.run import RunConfig
from megalong.training import metrics, profiling
from megalong.training import training_loss as meter_module
from megalong.training.metrics import MetricsLog, check_wandb, forget_after, read_metrics
from megalong.training.profiling import Profiler
from megalong.training.training_loss import Meter
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import small_run_flags

WORKER = __file__
PEAK = 0.05  # TFLOP/s of a rank
STEP_FLOPS, DENSE_STEP_FLOPS = 805_527_552, 856_424_448  # by hand: tests/model/test_flops.py


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """Six iterations on two ranks, all reports on, and what they printed."""
    folder = tmp_path_factory.mktemp("reports") / "run"
    reports = {"peak_tflops": PEAK, "save_interval": 2}
    reports |= {"profile": True, "profile_step_start": 3, "profile_step_end": 5}
    reports |= {"profile_ranks": 1, "wandb_project": "tests", "wandb_exp_name": "small"}
    flags = small_run_flags(corpus, **reports, save=folder, load=folder)
    return folder, run_ranks(2, WORKER, *flags).stdout, flags


def training_records(folder: Path) -> list[dict]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "split" not in r]


def test_utilisation_is_that_of_the_count_by_hand(run):
    """In the records, and in the log lines: 1024 tokens a step, on two ranks."""
    folder, text, _ = run
    records = training_records(folder)
    lines = [line for line in text.splitlines() if line.startswith("iteration ")]
    for record, line in zip(records, lines, strict=True):
        steps_per_second = record["tokens_per_second"] / 1024
        mfu = STEP_FLOPS * steps_per_second / (2 * PEAK * 1e12)
        dense = DENSE_STEP_FLOPS * steps_per_second / (2 * PEAK * 1e12)
        assert record["mfu"] == pytest.approx(mfu, rel=1e-12)
        assert record["mfu_dense_equivalent"] == pytest.approx(dense, rel=1e-12)
        assert f"| MFU {mfu:.1%} (dense equivalent {dense:.1%}) |" in line
    [flops] = [record["flops"] for record in records if "flops" in record]
    assert sum(flops["per_step"].values()) == STEP_FLOPS
    assert flops["dense_equivalent"] == DENSE_STEP_FLOPS
    assert (flops["peak_per_second"], flops["peak_source"]) == (2 * PEAK * 1e12, "--peak-tflops")
    assert "806 MFLOP an iteration (qkv 12%, attention 6%," in text
    assert "with dense attention 856 MFLOP; peak of 2 ranks 100 GFLOP/s" in text


def test_memory_waiting_and_saves(run):
    folder, text, _ = run
    records = training_records(folder)
    assert all(0 <= record["data_share"] < 1 for record in records)
    memory = [record["peak_memory_bytes"] for record in records]
    assert memory == sorted(memory) and 1e8 < memory[0] < 1e11
    assert "| peak memory " in text
    saves = [r for r in read_metrics(folder / "metrics.jsonl") if "save_seconds" in r]
    assert [r["iteration"] for r in saves] == [3, 5, 6] and saves[-1]["split"] == "validation"
    for record in saves:
        assert 0 < record["save_seconds"] <= record["save_blocking_seconds"] < 60
        assert f"| saved in {record['save_seconds']:.1f} s" in text


def test_tensorboard_has_the_curves(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    for record in training_records(folder):
        for name in ("loss", "mfu", "mfu_dense_equivalent", "data_share", "peak_memory_bytes"):
            point = next(e for e in board.Scalars(f"train/{name}") if e.step == record["iteration"])
            assert point.value == pytest.approx(record[name], rel=1e-6)
    [attention] = board.Scalars("flops/attention")
    assert attention.value == pytest.approx(50_552_832, rel=1e-6)
    assert board.Scalars("validation/perplexity") and board.Scalars("train/save_seconds")


def test_the_trace_has_the_iterations_asked_for(run):
    folder, text, _ = run
    [trace] = (folder / "profile").iterdir()
    assert trace.name == "rank1_iterations_3-4.json.gz"
    assert f"traced iterations 3 to 4: {trace}" in text
    names = {
        e.get("name", "") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    }
    assert {"iteration 3", "iteration 4"} <= names
    assert not names & {"iteration 2", "iteration 5"} and any("aten::mm" in n for n in names)


def test_weights_and_biases_hears_of_the_run_and_of_its_continuation(run, tmp_path):
    """The records' curves by iteration; the run that goes on has the run's id."""
    original, _, flags = run
    folder = tmp_path / "run"
    shutil.copytree(original, folder)
    flags = [str(folder) if word == str(original) else word for word in flags]
    run_ranks(2, WORKER, *flags, "--train-iters", 8, "--lr-decay-iters", 6, "--no-profile")
    calls = [json.loads(line) for line in (folder / "wandb_calls.jsonl").open()]
    first, second = (what for name, what in calls if name == "init")
    assert (first["project"], first["name"], first["dir"]) == ("tests", "small", str(original))
    assert first["id"] is None and first["config"]["model"]["hidden_size"] == 64
    assert second["id"] == (folder / "wandb_run_id").read_text()
    assert second["id"].startswith("tests-") and second["resume"] == "allow"
    assert ["*", "iteration"] in [what for name, what in calls if name == "define_metric"]
    logged = [what for name, what in calls if name == "log"]
    for record in training_records(folder):
        assert any(
            values["iteration"] == record["iteration"]
            and values.get("train/loss") == record["loss"]
            and values["train/mfu"] == record["mfu"]
            for values in logged
        )
    assert any("validation/perplexity" in values for values in logged)
    assert [what for name, what in calls if name == "finish"] == [0, 0]


def test_without_the_package_wandb(monkeypatch):
    config = resolved(wandb_project="tests")
    check_wandb(resolved())
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--wandb-project tests needs the package wandb: pip "):
        check_wandb(config)
    monkeypatch.setenv("RANK", "1")  # draws nothing
    check_wandb(config)


def test_a_service_that_fails_ends_no_training(tmp_path, monkeypatch):
    """Nor does it hide what does; and a file that a killed run left empty has no id."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "stand_in")
    sys.modules.pop("wandb", None)
    (tmp_path / "wandb_run_id").write_text("")
    said = []
    config = resolved(save=tmp_path, wandb_project="tests", tensorboard_dir=tmp_path)
    with pytest.raises(KeyError, match="real"), MetricsLog(config, 0, said.append) as log:
        [*_, board] = log._boards
        assert (tmp_path / "wandb_run_id").read_text() == board._run.id != ""
        assert not (tmp_path / "wandb_run_id.tmp").exists()
        monkeypatch.delattr("wandb._Run._call")
        for iteration in (1, 2):
            log.training({"iteration": iteration, "loss": 1.0})
        raise KeyError("real")
    [line] = said
    assert line.startswith("--wandb-project: curves are missing there: ")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    (tmp_path / "wandb_run_id").unlink()
    (tmp_path / "wandb_run_id").mkdir()
    with pytest.raises(UserError, match=r"--save .*wandb_run_id: Is a directory"):
        MetricsLog(config, 0, said.append)


def resolved(ranks=1, **changes):
    return parse_arguments(small_run_flags("unused", **changes)).resolve(ranks)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"profile": True}, "--profile writes a trace into the run folder: set --save"),
        (
            {"profile": True, "save": "x", "profile_step_start": 2, "profile_ranks": "0 2"},
            "--profile-ranks 2: this launch has 2 ranks, numbered from 0",
        ),
        ({"wandb_exp_name": "small"}, "set --wandb-project"),
        ({"peak_tflops": 0}, "--peak-tflops 0.0 must be positive"),
    ],
)
def test_flags_that_contradict_each_other(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        resolved(2, **changes)


def test_the_meter_leaves_out_what_is_no_training(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: clock[0])

    def batches():
        while True:
            clock[0] += 0.5
            yield {}

    meter = Meter(torch.device("cpu"))
    timed = meter.timed(batches())
    for _ in range(2):
        next(timed)
        clock[0] += 1.5
        meter.step()
        with meter.pause():
            clock[0] += 10
    clock[0] += 1
    assert meter.take() == (2.5, 0.2)
    next(timed)
    meter.step()
    assert meter.take() == (0.5, 1.0)


def test_a_save_in_the_background_takes_longer_than_the_training_stands_still(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: clock[0])
    meter = Meter(torch.device("cpu"))
    assert meter.take_save(None) == {}
    with meter.saving():
        clock[0] += 2
    clock[0] += 10
    assert meter.take_save(None) == {} == meter.take_save(durable_at=99.0)  # that was another one
    times = {"save_seconds": 7.0, "save_blocking_seconds": 2.0}
    assert meter.take_save(durable_at=107.0) == times
    assert meter.take_save(durable_at=107.0) == {}
    meter.step()
    assert meter.take() == (10.0, 0.0)


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu_calls(monkeypatch):
    """What is asked of a GPU that is not there: to wait, and of its memory."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    for name in ("record_memory_history", "write_memory_history"):
        monkeypatch.setattr(profiling, name, calls.append)
    monkeypatch.setattr(profiling, "forget_memory_history", lambda: calls.append("forget"))
    return calls


def profiled(tmp_path, iterations, error=None):
    """A profiler of iterations 2 and 3 on what it takes for a GPU; what it says. error: in the
    last of the iterations."""
    config = resolved(save=tmp_path, profile=True, profile_step_start=2, profile_step_end=4)
    said, mesh = [], SimpleNamespace(device=GPU, rank=0)
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with (
        expected as raised,
        Profiler(config, mesh, said.append, contextlib.nullcontext) as profiler,
    ):
        for iteration in iterations:
            with profiler.iteration(iteration):
                torch.ones(2) + 1
                if error is not None and iteration == iterations[-1]:
                    raise error
    assert error is None or raised.value is error
    return said


def test_on_a_gpu_there_is_a_snapshot_of_its_memory(tmp_path, gpu_calls):
    trace = tmp_path / "profile" / "rank0_iterations_2-3.json.gz"
    assert profiled(tmp_path, range(1, 6)) == [f"traced iterations 2 to 3: {trace}"]
    snapshot = tmp_path / "profile" / "rank0_iterations_2-3_memory.pickle"
    assert trace.exists()
    assert gpu_calls == ["wait", profiling.MEMORY_EVENTS, str(snapshot), "forget"]
    assert profiled(tmp_path, [1, 2])[0].startswith("traced iterations 2 to 2: ")  # ended early
    assert profiled(tmp_path, [4, 5]) == []


def test_out_of_memory_leaves_a_snapshot_of_it(tmp_path, gpu_calls):
    [line] = profiled(tmp_path, [1, 2], torch.OutOfMemoryError("full"))
    folder = tmp_path / "profile"
    assert line == f"traced iterations 2 to 2: {folder / 'rank0_iterations_2-2.json.gz'}"
    assert gpu_calls[2:] == [str(folder / "rank0_iterations_2-2_memory.pickle"), "forget"]


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("full")])
def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path, gpu_calls, error):
    (tmp_path / "profile").write_text("in the way")
    trace, snapshot = profiled(tmp_path, [1, 2, 3], error)
    assert trace.startswith("--profile: no trace of iterations 2 to 3: ")
    assert snapshot.startswith("--profile: no snapshot of memory of iterations 2 to 3: ")
    assert gpu_calls[2:] == ["forget"]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
    assert importlib.util.find_spec("wandb")

    import pretrain_longnet

    pretrain_longnet.main(sys.argv[1:])


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
