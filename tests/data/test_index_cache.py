"""Orders of many documents on the disk: made once, the same for all, and whole."""

import multiprocessing
import os
from functools import partial

import numpy as np
import pytest

from megalong.data import document_order
from megalong.data.document_order import IndexCache
from megalong.data.stream import TokenStream
from megalong.utils.errors import UserError


class Many:
    prefix, max_token_id = "many", None

    def __init__(self, seed: int = 0):
        self.lengths = np.random.default_rng(seed).integers(0, 9, 3000)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return document + np.arange(start, stop)


@pytest.fixture(autouse=True)
def three_thousand_are_many(monkeypatch):
    monkeypatch.setattr(document_order, "LARGE", 1000)


def stream(folder, documents=None, **options) -> TokenStream:
    cache = None if folder is None else IndexCache(str(folder))
    return TokenStream(documents or Many(), range(3000), 100, cache=cache, **options)


def test_the_order_is_that_without_a_cache(tmp_path):
    for options in ({"seed": 1}, {"seed": 2}, {"seed": 1, "salt": 5}):
        kept, plain = stream(tmp_path, **options), stream(None, **options)
        for i in (0, 3, plain.samples_per_epoch + 1):
            assert kept.sample(i).tolist() == plain.sample(i).tolist()
    assert len(list(tmp_path.glob("*.npy"))) == 6  # two epochs of each
    stream(tmp_path, Many(1), seed=1).sample(0)  # other documents
    assert len(list(tmp_path.glob("*.npy"))) == 7
    stream(tmp_path, seed=1).sample(0)
    assert len(list(tmp_path.glob("*.npy"))) == 7 and not list(tmp_path.glob("*.partial"))


def test_a_broken_file_is_made_anew(tmp_path):
    expected = stream(tmp_path).sample(0).tolist()
    [file] = tmp_path.glob("*.npy")
    os.truncate(file, 200)
    assert stream(tmp_path).sample(0).tolist() == expected
    assert file.stat().st_size > 200


def test_small_ones_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(document_order, "LARGE", 3001)
    stream(tmp_path).sample(0)
    assert list(tmp_path.iterdir()) == []


def _sample(folder, made, results):
    document_order.LARGE = 1000
    original = TokenStream._index

    def counted(self, epoch):
        made.put(os.getpid())
        return original(self, epoch)

    TokenStream._index = counted
    results.put(stream(folder).sample(3).tolist())


def test_of_many_processes_one_makes_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    made, results = fork.Queue(), fork.Queue()
    ranks = [fork.Process(target=_sample, args=(tmp_path, made, results)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    samples = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert samples == [stream(None).sample(3).tolist()] * 6
    made.get(timeout=1)
    assert made.empty()


def test_a_folder_that_users_share(tmp_path, monkeypatch):
    """A lock of another user's can be read, and not written to."""
    (tmp_path / "lock").touch(0o444)
    monkeypatch.setattr(document_order.os, "open", partial(read_only, os.open))
    expected = stream(None).sample(0).tolist()
    assert stream(tmp_path).sample(0).tolist() == expected
    assert len(list(tmp_path.glob("*.npy"))) == 1


def read_only(open_file, path, flags, *mode):
    if str(path).endswith("lock") and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise PermissionError(path)
    return open_file(path, flags, *mode)


def test_a_folder_that_cannot_be_written():
    with pytest.raises(UserError, match=r"--data-cache-path /proc/x: cannot be made"):
        IndexCache("/proc/x")
