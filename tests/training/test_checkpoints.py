"""Checkpoints as files: which stay, which is best, saving in the background, damage, kills."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from megalong.checkpoint import writing
from megalong.checkpoint.content import Progress
from megalong.checkpoint.folder import (
    being_read,
    best,
    checkpoints,
    clear_leftovers,
    find_checkpoint,
    latest,
    link_best,
    point_at,
    remove_old,
    set_aside,
)
from megalong.checkpoint.manifest import DamagedCheckpoint, Manifest, check_files, check_share
from megalong.checkpoint.reading import CheckpointReader
from megalong.config import Config, RunConfig
from megalong.training.run_folder import BestCheckpoint
from megalong.utils.errors import UserError
from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, run, run_here, small_run_flags
from tests.training.test_bad_input import refused
from tests.training.test_resume import assert_same_run


def make_checkpoints(run, iterations):
    for iteration in iterations:
        folder = run / f"iter_{iteration:07d}"
        folder.mkdir()
        Manifest(1, {}).write(folder)
    return folder


def iterations(run):
    return [int(path.name.removeprefix("iter_")) for path in checkpoints(run)]


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [
        (1, None, [60, 70]),  # 70 is newer than the newest: a damaged one that was left behind
        (2, None, [50, 60, 70]),
        (9, None, [10, 20, 30, 40, 50, 60, 70]),
        (1, 20, [20, 40, 60, 70]),
        (2, 30, [30, 50, 60, 70]),
    ],
)
def test_what_is_kept(tmp_path, keep_last, keep_every, kept):
    make_checkpoints(tmp_path, range(10, 80, 10))
    remove_old(tmp_path / "iter_0000060", keep_last, keep_every)
    assert iterations(tmp_path) == kept == sorted(kept)
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_what_is_being_read_stays(tmp_path):
    newest = make_checkpoints(tmp_path, (1, 2, 3))
    with being_read(tmp_path / "iter_0000001"):
        remove_old(newest, 1, None)
        assert iterations(tmp_path) == [1, 3]
    remove_old(newest, 1, None)
    assert iterations(tmp_path) == [3]


def test_the_best_one_stays(tmp_path):
    newest = make_checkpoints(tmp_path, (1, 2, 3))
    for iteration in (1, 2):
        link_best(tmp_path / f"iter_{iteration:07d}")
    remove_old(newest, 1, None)
    assert iterations(tmp_path) == [2, 3] and best(tmp_path).name == "iter_0000002"
    assert find_checkpoint(tmp_path / "best") == tmp_path / "iter_0000002"


def test_a_damaged_one_counts_for_nothing(tmp_path):
    newest = make_checkpoints(tmp_path, (1, 2, 3))
    set_aside(tmp_path / "iter_0000002")
    remove_old(newest, 2, None)
    clear_leftovers(tmp_path)
    assert iterations(tmp_path) == [1, 3] and (tmp_path / "iter_0000002.damaged").exists()


def test_the_pointer(tmp_path):
    point_at(tmp_path / "iter_0000003")
    assert latest(tmp_path).name == "iter_0000003"
    (tmp_path / "latest").write_bytes(b"../\xff")
    assert latest(tmp_path) is None


def test_what_is_no_checkpoint(tmp_path):
    checkpoint = tmp_path / "iter_0000003"
    with pytest.raises(UserError, match="run is not there: give a run folder"):
        find_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match=r"is an empty folder: give a run folder with"):
        find_checkpoint(tmp_path)
    point_at(checkpoint)
    for words in ("is not there", "is an empty folder", "is damaged: it has no manifest.json"):
        with pytest.raises(UserError, match=rf"iter_0000003 {words}, and the file `latest` names"):
            find_checkpoint(tmp_path)
        with pytest.raises(DamagedCheckpoint, match=rf"iter_0000003 {words}$"):
            Manifest.read(checkpoint)
        folder = checkpoint / "a" if checkpoint.exists() else checkpoint
        folder.mkdir(exist_ok=True)


class Attack:
    def __reduce__(self):
        return os.system, ("true",)


def test_the_list_of_tensors_cannot_run_code(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(DamagedCheckpoint, match=r"system has no place in a list of tensors"):
        CheckpointReader(tmp_path)


class AttributeOf:
    """Pickled as Python 3.11.0 to 3.11.3 do enums."""

    def __init__(self, *of):
        self.of = of

    def __reduce__(self):
        return getattr, self.of


def test_the_list_of_tensors_may_be_of_an_earlier_python(tmp_path):
    metadata = Metadata({"x": AttributeOf(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = CheckpointReader(tmp_path)
    assert reader.tensors["x"] is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    metadata.state_dict_metadata["x"] = AttributeOf(Metadata, "__init__")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpoint, match=r"__init__ has no place in a list of tensors"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "run, words",
    [
        ({"keep_last": 0}, "--keep-last 0 must be positive"),
        ({"save": "run", "keep_every": 2000}, "set --keep-last too"),
        ({"save": "run", "keep_last": 1, "keep_every": 1500}, "set --keep-every 2000"),
        ({"keep_last": 1}, "set --save"),
        ({"save": "run", "keep_best": True, "save_interval": 300}, "set --save-interval 1000"),
        ({"save": "run", "keep_best": True, "full_validation": True}, "set --eval-iters 0"),
    ],
)
def test_flags_that_cannot_be_meant(run, words):
    with pytest.raises(UserError, match=words):
        Config(run=RunConfig(**run)).resolve(1)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class SlowDisk:
    """In place of `write_checkpoint`: each write waits until it is let through."""

    def __init__(self, monkeypatch):
        self.events, self.let = [], threading.Semaphore(0)
        monkeypatch.setattr(writing, "write_checkpoint", self)

    def __call__(self, checkpoint, *_):
        assert self.let.acquire(timeout=60)
        if checkpoint.name == "iter_0000003":
            raise OSError(28, "No space left on device")
        self.events.append(f"wrote {checkpoint.name}")


def test_in_the_background(one_rank, monkeypatch, tmp_path):
    disk = SlowDisk(monkeypatch)
    config = Config(run=RunConfig(save=str(tmp_path), async_save=True))
    with writing.Saver(config, disk.events.append) as saver:
        saver.save(Progress(iteration=1), {})
        assert disk.events == []  # training goes on

        threading.Timer(0.2, disk.let.release).start()
        saver.save(Progress(iteration=2), {})  # waits for the first
        first = ["wrote iter_0000001", f"saved {tmp_path}/iter_0000001"]
        assert disk.events == first

        disk.let.release()
        saver.wait()
        assert not saver.failed
        second = ["wrote iter_0000002", f"saved {tmp_path}/iter_0000002"]
        assert disk.events == first + second

        saver.save(Progress(iteration=4), {})
        threading.Timer(0.2, disk.let.release).start()
    assert disk.events[-1] == f"saved {tmp_path}/iter_0000004"  # at the end


def test_an_error_comes_to_the_training(one_rank, monkeypatch, tmp_path):
    disk = SlowDisk(monkeypatch)
    config = Config(run=RunConfig(save=str(tmp_path), async_save=True))
    refusal = pytest.raises(UserError, match="iter_0000003 could not be written: No space left")
    with refusal, writing.Saver(config, disk.events.append) as saver:
        saver.save(Progress(iteration=3), {})
        assert not saver.failed
        disk.let.release()
        while not saver.failed:
            time.sleep(0.01)
    assert disk.events == []


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


SAVING_LOOP, LIMITED_RUN = (
    str(Path(__file__).with_name(name)) for name in ("saving_loop.py", "killed_run.py")
)
INSPECT = REPOSITORY / "tools" / "inspect_checkpoint.py"


def flags(corpus, folder, **changes):
    return small_run_flags(corpus, **{"save_interval": 2} | changes, save=folder, load=folder)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A run of two ranks, with checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(2, PRETRAIN, *flags(corpus, folder))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.glob("iter_*/*")}


@pytest.mark.parametrize("kills", [15, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize("mode", ["now", "background"])
def test_many_kills(tmp_path, mode, kills):
    done = run([sys.executable, SAVING_LOOP, str(tmp_path / "run"), str(kills), mode])
    assert int(done.stdout) >= kills


@pytest.mark.parametrize(
    "damage, name, words",
    [
        (flip, "__1_0.distcp", "is not what was written"),
        (flip, ".metadata", "is not what was written"),
        (flip, "config.yaml", "is not what was written"),
        (cut, "__1_0.distcp", "bytes instead of"),
        (cut, "manifest.json", "is not what was written"),
        (Path.unlink, "__0_0.distcp", "it has no"),
        (Path.unlink, "progress.json", "it has no"),
        (Path.unlink, "manifest.json", "it has no"),
    ],
)
def test_damage_is_found(copy, damage, name, words):
    checkpoint = copy / "iter_0000006"
    check_share(checkpoint, check_files(checkpoint))
    damage(checkpoint / name)
    with pytest.raises(DamagedCheckpoint) as found:
        check_share(checkpoint, check_files(checkpoint))
    assert name in str(found.value) and words in str(found.value)


def test_a_flipped_byte_and_the_way_back(corpus, finished, copy):
    """Refused, with nothing changed; then --load-fallback goes back to the sound one, and what it
    leaves at the end is what the undamaged run has left."""
    flip(copy / "iter_0000006" / "__1_0.distcp")  # which the second rank finds
    cut(copy / "iter_0000004" / "__0_0.distcp")
    before = contents(copy)
    line = refused(2, *flags(corpus, copy))
    assert f"{copy}/iter_0000006 is damaged: __1_0.distcp is not what was written" in line
    assert "--load-fallback" in line and contents(copy) == before

    done = run_ranks(2, PRETRAIN, *flags(corpus, copy, load_fallback=True))
    for name in ("iter_0000006", "iter_0000004"):
        assert f"{name} is damaged" in done.stdout
        assert (copy / f"{name}.damaged").exists()
    assert f"resuming from {copy}/iter_0000002" in done.stdout
    assert_same_run(copy, finished)


def test_a_full_disk(corpus, tmp_path):
    """On a real one, which has room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2300k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small disk")
    try:
        folder = disk / "run"
        line = refused(1, *flags(corpus, folder))
        assert f"--save {folder}: the checkpoint {folder}/iter_0000004 could not be" in line
        assert "No space left on device" in line and "iter_0000002 stays in force" in line
        assert_last_is_two(folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_one_rank_cannot_write(corpus, tmp_path):
    """In the background: all ranks hear of it and end, and the checkpoint before is untouched."""
    folder = tmp_path / "run"
    changes = {"async_save": True, "train_iters": 400}
    line = refused(2, "limit", 2, *flags(corpus, folder, **changes), script=LIMITED_RUN)
    assert f"the checkpoint {folder}/iter_0000004 could not be written: File too large" in line
    assert "iter_0000002 stays in force" in line
    assert_last_is_two(folder)


def assert_last_is_two(folder: Path) -> None:
    assert [path.name for path in sorted(folder.glob("iter_*"))] == ["iter_0000002"]
    assert (folder / "latest").read_text() == "iter_0000002"
    check_share(folder / "iter_0000002", check_files(folder / "iter_0000002"))


def test_inspecting(copy):
    shown = run_here(INSPECT, copy, "--verify").stdout
    for words in (
        f"{copy}/iter_0000006: ",
        "iteration 6 | 48 sequences | 6,144 tokens | 6 updates",
        "2 ranks: sequence 1 x tensor 1 x pipeline 1 x data 2, ZeRO 1",
        "exp_avg_sq.decoder.layers.1.mlp.linear_fc1.weight",
        "float32   384 x 64",
        "num_layers: 2",
        "sound: 5 files",
    ):
        assert words in shown, shown
    assert shown.splitlines()[1].startswith("sound: ")
    brief = run_here(INSPECT, copy, "--brief", "--json").stdout
    content = json.loads(brief)
    assert content["iteration"] == 6 and not content["verified"] and "tensors" not in content
    assert content["stages"] == []
    assert content["values"] > 3 * content["parameters"] > 0  # with both moments, random states
    flip(copy / "iter_0000006" / "__0_0.distcp")
    done = run_here(INSPECT, copy / "iter_0000006", "--verify", check=False)
    assert done.returncode == 2 and "__0_0.distcp is not what was written" in done.stderr
