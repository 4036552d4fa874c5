"""Batches made ahead: the same ones, none lost, and the thread is gone at the end."""

import itertools
import threading
import time

import pytest
import torch

from megalong.data.batches import made_ahead, training_batches
from megalong.data.indexed import IndexedDocuments
from megalong.data.stream import TokenStream
from megalong.utils.errors import UserError

CPU = torch.device("cpu")


def numbered(count, on_made=lambda number: None):
    """Batches that hold their number."""
    for number in range(count):
        on_made(number)
        yield {"tokens": torch.tensor([number])}


def numbers(batches):
    return [int(batch["tokens"]) for batch in batches]


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not data_threads()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_all_in_their_order(count):
    with made_ahead(numbered(count), CPU) as batches:
        assert numbers(batches) == list(range(count))
        assert numbers(batches) == []  # it stays at its end


def test_the_same_as_without_it(write_documents):
    """Bit for bit, from wherever a run goes on."""
    documents = IndexedDocuments(write_documents([list(range(i, 9 * i + 3)) for i in range(20)]))
    for consumed in (0, 6):
        plain, ahead = (
            training_batches(
                TokenStream(documents, range(20), 16, seed=3),
                consumed_samples=consumed,
                global_batch_size=6,
                micro_batch_size=3,
                data_parallel_rank=1,
                data_parallel_size=2,
            )
            for _ in range(2)
        )
        with made_ahead(ahead, CPU) as batches:
            for one, other in itertools.islice(zip(plain, batches, strict=False), 5):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_is_made_ahead_and_no_more():
    made = []
    with made_ahead(numbered(9, made.append), CPU) as batches:
        for taken in range(3):
            next(batches)
            wait_until(lambda taken=taken: len(made) == taken + 2)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def test_an_error_comes_where_its_batch_would_have_come():
    def broken():
        yield from numbered(2)
        raise UserError("--data-path data: the disk is gone")

    with made_ahead(broken(), CPU) as batches:
        assert numbers(itertools.islice(batches, 2)) == [0, 1]
        with pytest.raises(UserError, match="--data-path data: the disk is gone"):
            next(batches)


def test_an_error_of_the_training_ends_the_thread():
    with pytest.raises(ZeroDivisionError), made_ahead(numbered(9), CPU) as batches:
        next(batches)
        raise ZeroDivisionError


def test_batches_for_a_gpu_are_pinned_by_a_thread_on_that_gpu(monkeypatch):
    devices, pinned = [], []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: devices.append((gpu, threading.current_thread().name))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with made_ahead(numbered(2), torch.device("cuda", 3)) as batches:
        assert numbers(batches) == [0, 1] and len(pinned) == 2
    [(gpu, thread)] = devices
    assert gpu == torch.device("cuda", 3) and thread.startswith("data")


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
