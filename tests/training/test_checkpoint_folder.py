"""Which checkpoints stay, and that the list of tensors cannot run code."""

import os
import pickle

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

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
from megalong.checkpoint.manifest import DamagedCheckpoint, Manifest
from megalong.checkpoint.reading import CheckpointReader
from megalong.config import Config, RunConfig
from megalong.utils.errors import UserError


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
