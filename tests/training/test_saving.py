"""Saving in the background: one at a time, nothing announced early, nothing lost at the end."""

import threading
import time

import pytest
import torch.distributed as dist

from megalong.checkpoint import writing
from megalong.checkpoint.content import Progress
from megalong.config import Config, RunConfig
from megalong.utils.errors import UserError


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
