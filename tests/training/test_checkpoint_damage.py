"""A checkpoint is whole or it is not there; damage is named, and the one before it still serves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megalong.checkpoint.manifest import DamagedCheckpoint, check_files, check_share
from tests.forked import run_ranks
from tests.launching import PRETRAIN, REPOSITORY, run, run_here, small_run_flags
from tests.training.test_bad_input import refused
from tests.training.test_resume import assert_same_run

SAVING_LOOP, LIMITED_RUN = (
    str(Path(__file__).with_name(name)) for name in ("saving_loop.py", "limited_run.py")
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
    line = refused(2, *flags(corpus, folder, **changes), script=LIMITED_RUN)
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
