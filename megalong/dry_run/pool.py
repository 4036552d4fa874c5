"""Processes that plan, each on one core: with a fake GPU, or for launches on the CPU."""

from __future__ import annotations

import contextlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import active_children, get_context


@contextlib.contextmanager
def planning_processes(
    on_gpu: bool, processes: int | None = None
) -> Iterator[Callable[..., Future]]:
    """Inside, a function that has one of these processes call a function with some arguments.

    processes: how many; default, as many as this one may use cores. An exception, Ctrl-C too, ends
    them in the midst of what they do.
    """
    count = processes or len(os.sched_getaffinity(0))
    before = active_children()
    pool = ProcessPoolExecutor(count, get_context("spawn"), initializer=_start, initargs=(on_gpu,))

    def submit(function: Callable, *arguments) -> Future:
        # This may start a process, which a terminal would send Ctrl-C to as well: not its affair.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        yield submit
    except BaseException:
        for process in active_children():
            if process not in before:
                process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(on_gpu: bool) -> None:
    """What such a process does first."""
    if on_gpu:
        from megalong.dry_run import fake_device

        fake_device.load()
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    torch.set_num_threads(1)
    if on_gpu:
        fake_device.pretend()
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    warnings.simplefilter("ignore")  # of libraries, about tensors that have no data
