"""This machine: its device, its free memory, its free ports."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

from megalong.utils.errors import UserError

# Of a memory cgroup, version 2 and 1: its limit, what counts against it, and the name in
# memory.stat of the file cache in it, which gives way.
GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def use_gpu() -> bool:
    """Return whether there is a GPU, unless DeepSpeed's variable DS_ACCELERATOR says cpu."""
    import torch  # not for --help

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def host_bytes_available(root: Path = Path("/")) -> int:
    """Return the bytes that the processes of this host, container or job can still get before it
    swaps or kills: Linux's MemAvailable, or what is left in one of the process's control groups.

    root: where /proc and /sys are. On other systems: the pages that are free, or all.
    """
    found = [*_machine(root / "proc/meminfo"), *_groups(root)]
    if not found:
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return max(0, min(found))


def _machine(meminfo: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """Return what is left in the process's memory groups and in those around them: in a container,
    which may be told the path of its group on the host and not see it, of the root."""
    with contextlib.suppress(OSError):
        for line in root.joinpath("proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                top = root / "sys/fs/cgroup/memory"
            elif controllers == "":
                top = root / "sys/fs/cgroup"
            else:
                continue
            group = top / path.strip("/")
            for folder in {top, group, *(p for p in group.parents if p.is_relative_to(top))}:
                yield from _left(folder)


def _left(group: Path) -> Iterator[int]:
    for limit, usage, cache in GROUP_FILES:
        with contextlib.suppress(OSError):
            text = group.joinpath(limit).read_text().strip()
            if text != "max":
                stat = dict(
                    line.split() for line in group.joinpath("memory.stat").read_text().splitlines()
                )
                used = int(group.joinpath(usage).read_text()) - int(stat.get(cache, 0))
                yield int(text) - used


def resident_bytes() -> int:
    """Return the memory of this process; 0 on systems that do not have it in /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def give_back_memory() -> None:
    """Have glibc return to the system what is free between blocks that are not."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def check_master_port() -> None:
    """Raise UserError where MASTER_PORT is no port, or where this is rank 0 and another program
    listens there. (torchrun listens there itself.)"""
    port = os.environ.get("MASTER_PORT")
    if "RANK" not in os.environ or port is None:
        return
    if not (port.isdecimal() and int(port) < 1 << 16):
        raise UserError(f"MASTER_PORT is {port!r}: set it to the number of a free port")
    agent_listens = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["RANK"] != "0" or agent_listens:
        return
    with socket.socket() as probe:  # which does not listen: other ranks may be calling already
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as who listens later
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise port_is_taken(port) from error


def free_port() -> int:
    """Return a port that no program of this machine listens on, drawn anew by each call.

    It lies below those that Linux hands out to whoever asks for any port: hardly anybody takes it
    before who asked for it listens there.
    """
    draw = random.SystemRandom()  # whatever seeds are set
    while True:
        port = draw.randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise


def port_is_taken(port: str) -> UserError:
    """Make the error on a port of the ranks that another program listens on."""
    return UserError(
        f"port {port}, where the ranks meet, is taken, by another run perhaps: give the launcher"
        " another --master_port"
    )
