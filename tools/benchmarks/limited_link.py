"""Ranks of a launch on this machine, joined by links of a bandwidth that is set as they run.

    with limited_network(4) as network:
        network.limit(100e6)
        network.run(["python", "script.py"])

Each rank has a network namespace of its own with one link, to a bridge in one more namespace, as
nodes have to a switch. Linux's token bucket filter (`tc tbf`) limits each in both directions, so a
rank sends at that rate and receives at that rate, at the same time. Nothing leaves the machine, and
its own network is not touched. What is limited are frames: of 1,514 bytes 1,448 are the program's.

Linux, the package iproute2, and the rights of root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalong.utils.errors import UserError

# Of an Ethernet frame with an MTU of 1,500: the headers of Ethernet, IP and TCP (with timestamps).
GOODPUT = 1448 / 1514
LINK = "uplink"  # the name of a rank's device
# What may go at once after a pause: little, but enough for a timer that is late.
BURST_BYTES, BURST_SECONDS = 32 * 1024, 1e-3
# Bytes that wait: enough that nothing is dropped. A sender's own queue holds back its sockets.
QUEUE = 16 * 1024 * 1024
# TCP, as it is set up between nodes that compute, then communicate: after a pause it goes on at the
# rate that the link was found to have, and what a connection has waiting in its own queue is short,
# or the receipts for what comes the other way would wait behind it.
TCP = {"tcp_slow_start_after_idle": 0, "tcp_limit_output_bytes": 128 * 1024}


@dataclass(frozen=True)
class Network:
    """The namespaces of so many ranks; `name` is what theirs begin with."""

    name: str
    ranks: int

    def namespace(self, rank: int) -> str:
        return f"{self.name}-{rank}"

    @property
    def switch(self) -> str:
        return f"{self.name}-switch"

    def limit(self, bits_per_second: float | None) -> None:
        """Of all links from now on, in each direction; None: as fast as the machine is. Any rank
        may call it."""
        for rank in range(self.ranks):
            for where, device in ((self.namespace(rank), LINK), (self.switch, f"to{rank}")):
                _tc(where, device, bits_per_second)

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a command as all ranks, told what torchrun tells them. Raises RuntimeError with the
        end of what they printed where one fails; the others are ended then."""
        common = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": _address(0)}
        common |= {"MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": LINK}
        processes: list[subprocess.Popen] = []
        with contextlib.ExitStack() as stack:
            errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(self.ranks)]
            try:
                for rank, file in enumerate(errors):
                    mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    processes.append(
                        subprocess.Popen(
                            ["ip", "netns", "exec", self.namespace(rank), *command],
                            env={**os.environ, **environment, **common, **mine},
                            stdout=subprocess.DEVNULL,
                            stderr=file,
                        )
                    )
                while None in [process.poll() for process in processes]:
                    if any(process.poll() for process in processes):
                        break
                    time.sleep(0.1)
            finally:
                status = [process.poll() for process in processes]
                for process in processes:
                    process.kill()
                    process.wait()
            for code, file in zip(status, errors, strict=True):
                if code:
                    file.seek(0)
                    said = file.read()[-6000:].decode(errors="replace")
                    raise RuntimeError(f"a rank of the launch failed: {said}")


@contextlib.contextmanager
def limited_network(ranks: int) -> Iterator[Network]:
    """Namespaces and links of so many ranks, gone afterwards. Raises UserError where the machine
    does not allow them."""
    require_limited_links()
    network = Network(f"megalong-{os.getpid()}", ranks)
    made: list[str] = []
    try:
        for namespace in (network.switch, *map(network.namespace, range(ranks))):
            _ip("netns", "add", namespace)
            made.append(namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        bridge = ("-n", network.switch, "link")
        _ip(*bridge, "add", "bridge", "type", "bridge")
        _ip(*bridge, "set", "bridge", "up")
        for rank in range(ranks):
            mine, other = network.namespace(rank), f"to{rank}"
            _ip("-n", mine, "link", "add", LINK, "type", "veth", "peer", other)
            _ip("-n", mine, "link", "set", other, "netns", network.switch)
            _ip(*bridge, "set", other, "master", "bridge", "up")
            _ip("-n", mine, "address", "add", f"{_address(rank)}/16", "dev", LINK)
            _ip("-n", mine, "link", "set", LINK, "up")
            for setting, value in TCP.items():
                write = f"echo {value} > /proc/sys/net/ipv4/{setting}"
                _ip("netns", "exec", mine, "sh", "-c", write)
        yield network
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)


def bytes_sent() -> int:
    """By this rank over its link so far: whole frames."""
    return int(Path(f"/sys/class/net/{LINK}/statistics/tx_bytes").read_text())


def why_not() -> str | None:
    """What this machine lacks for limited links; None if nothing."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"no {' and no '.join(missing)} here: install the package iproute2"
    if os.geteuid():
        return "network namespaces can be made by root alone"
    name = f"megalong-{os.getpid()}-probe"
    steps = (
        ["ip", "netns", "add", name],
        ["ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "two"],
        ["ip", "-n", name, "link", "add", "bridge", "type", "bridge"],
        ["tc", "-n", name, "qdisc", "add", "dev", "one", *_bucket(1e8)],
    )
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{' '.join(step[:1] + step[3:])}: {done.stderr.strip()}"
        return None
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def require_limited_links() -> None:
    """Raise UserError where the machine does not allow them."""
    reason = why_not()
    if reason is not None:
        raise UserError(f"links cannot be limited here: {reason}")


def _address(rank: int) -> str:
    return f"10.77.{(rank + 1) // 256}.{(rank + 1) % 256}"


def _bucket(bits_per_second: float) -> list[str]:
    burst = max(BURST_BYTES, round(bits_per_second / 8 * BURST_SECONDS))
    rate = f"{bits_per_second:.0f}bit"
    return ["root", "tbf", "rate", rate, "burst", str(burst), "limit", str(QUEUE)]


def _tc(namespace: str, device: str, bits_per_second: float | None) -> None:
    command = ["tc", "-n", namespace, "qdisc"]
    if bits_per_second is not None:
        subprocess.run([*command, "replace", "dev", device, *_bucket(bits_per_second)], check=True)
    else:  # there may be none
        delete = [*command, "delete", "dev", device, "root"]
        subprocess.run(delete, capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
