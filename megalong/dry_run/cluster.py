"""What a launch runs on: a device, and how many of them are joined by what.

A cluster is a YAML file: one of clusters/ by its name, or the user's own (`--cluster NAME|FILE`).
Its `device` is a file of devices/ by name, or stands in it as a section. Units are bytes, seconds,
FLOP/s and dollars; of links and memory, in one direction. `between_nodes.bandwidth` is that of one
of a node's `adapters`: 8 of 50 GB/s are 400 GB/s for a node. `attainable` are the shares of a
figure that a program gets: a number, or a list of [size, share] between which it is interpolated,
where the size is that of a call: FLOPs of a product, FLOPs for each byte of an attention (they grow
with the rows that a query attends to), bytes of what is bound by memory or goes over a link.

What has been measured on such a machine says so under `calibrated` (tools/calibrate_device.py
writes such files); everything else is from data sheets and papers, named in the files, or an
estimate.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalong.utils.errors import UserError, did_you_mean
from megalong.utils.files import read_yaml


class Section:
    """A mapping of a file."""

    def __init__(self, values: dict[str, Any], where: str, name: str = "", line: int = 1):
        """where: the flag and the file, as messages begin. name: of the section, "" for the file.
        line: on which it begins."""
        self._values, self._where, self.name, self._line = values, where, name, line

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def keys(self) -> list[str]:
        """Those that there are."""
        return list(self._values)

    def only(self, *known: str) -> None:
        """Refuse other keys: to be called first, so that a misspelt one is not said to be
        missing."""
        for key in self._values:
            if key not in known:
                raise self.error(key, f"is not a key of it{did_you_mean(str(key), known)}")

    def error(self, key: str, message: str) -> UserError:
        """To be raised: `message` is said of the key."""
        line = _line_of(self._values, key, self._line)
        full = f"{self.name}.{key}" if self.name else key
        return UserError(f"{self._where}, line {line}: {full} {message}")

    def raw(self, key: str) -> Any:
        """The value as it stands there; UserError where there is none."""
        if key not in self:
            raise self.error(key, "is missing")
        return self._values[key]

    def text(self, key: str) -> str:
        """A word or several."""
        value = self.raw(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, f"is {value!r}, and must be text")
        return value.strip()

    def number(self, key: str, low: float, high: float, unit: str = "") -> float:
        """A number from low to high. unit: what it is a number of, for messages."""
        return self._checked(key, self.raw(key), low, high, unit)

    def whole(self, key: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.number(key, low, high)
        if value != int(value):
            raise self.error(key, f"is {value:g}, and must be a whole number")
        return int(value)

    def table(
        self, key: str, low: float, high: float, unit: str = ""
    ) -> tuple[tuple[float, float], ...]:
        """A number, or a list of pairs [size, number] with growing sizes: as such a list."""
        value = self.raw(key)
        if not isinstance(value, list):
            return ((1.0, self._checked(key, value, low, high, unit)),)
        pairs = []
        for row in value:
            if not isinstance(row, list) or len(row) != 2:
                raise self.error(key, f"has the row {row!r}: rows are [size, number]")
            size = self._checked(key, row[0], 1, 1e24, "as a size")
            if pairs and size <= pairs[-1][0]:
                raise self.error(key, f"has size {size:g} after {pairs[-1][0]:g}: let sizes grow")
            pairs.append((size, self._checked(key, row[1], low, high, unit)))
        if not pairs:
            raise self.error(key, "is an empty list")
        return tuple(pairs)

    def section(self, key: str) -> Section:
        """A mapping in this one."""
        value = self.raw(key)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}, and must hold keys of its own")
        full = f"{self.name}.{key}" if self.name else key
        return Section(value, self._where, full, _line_of(self._values, key, self._line))

    def numbers(self, keys: Iterable[str], low: float, high: float, unit: str = ""):
        """Of some keys, those that there are; at least one must be."""
        found = {key: self.number(key, low, high, unit) for key in keys if key in self}
        if not found:
            raise self.error(next(iter(keys)), "is missing")
        return found

    def _checked(self, key: str, value: Any, low: float, high: float, unit: str) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not low <= number <= high:  # NaN is in no range
            unit = f" {unit}" if unit else ""
            raise self.error(key, f"is {value}, and must be from {low:g} to {high:g}{unit}")
        return number


def read_section(path: Path, where: str) -> Section:
    """A file whose content is a mapping. where: how messages begin, the flag with the file."""
    _, content = read_yaml(where, path, _Loader)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected keys with values, one a line")
    return Section(content, where)


class _Mapping(dict):
    """With the line of each key."""

    lines: dict[Any, int]


def _line_of(values: dict, key: str, otherwise: int) -> int:
    return getattr(values, "lines", {}).get(key, otherwise)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        mapping = _Mapping(super().construct_mapping(node, deep=True))
        mapping.lines = {
            self.construct_object(key): key.start_mark.line + 1 for key, _ in node.value
        }
        if len(mapping) < len(node.value):
            raise yaml.YAMLError(f"a key stands twice among {', '.join(map(str, mapping))}")
        return mapping


_Loader.add_constructor(
    "tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node)
)


CLUSTERS = Path(__file__).parent / "clusters"
DEVICES = Path(__file__).parent / "devices"

DTYPES = ("bfloat16", "float16", "float32", "float64")
# The collectives of `megalong.parallel.traffic`.
COLLECTIVES = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "reduce", "send",
    "receive",
)  # fmt: skip
_OTHERS = "others"


@dataclass(frozen=True)
class Curve:
    """A share by the size of a call: straight between the points over the logarithm of the size,
    constant beyond the first and the last."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The share of a call of this size."""
        sizes = [point[0] for point in self.points]
        i = bisect_left(sizes, size)
        if i in (0, len(sizes)):
            return self.points[min(i, len(sizes) - 1)][1]
        (low, at_low), (high, at_high) = self.points[i - 1 : i + 1]
        return at_low + (at_high - at_low) * math.log(size / low) / math.log(high / low)


@dataclass(frozen=True)
class Device:
    """One GPU, or one core or more of a CPU that a rank has.

    memory: bytes. peak_flops: FLOP/s of dense products by dtype, with sums in float32.
    memory_bandwidth: bytes/s, read and written together.
    product, attention_forward, attention_backward: attainable shares of peak_flops by dtype; by the
        FLOPs of a product, and by an attention's FLOPs for each of its bytes. memory_share: that of
        memory_bandwidth, by the bytes of a call.
    kernel_seconds: what every kernel takes beside its work, on the device. On a CPU, which computes
        as it is told, this is what calling an operator takes.
    launch_seconds: of the host, for every kernel and collective (`Work.launches`), with all that it
        does between two of them; the host runs ahead, so a step takes as long as its launches at
        least. 0 on a CPU.
    overlap: the share of a collective's time that computation beside it hides. The rest is
        computation's loss of processors, caches and bandwidth to the collective.
    calibrated: when and on what this was measured; None if it was not.
    on_gpu: whether it is a GPU.
    """

    name: str
    memory: float
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    product: Mapping[str, Curve]
    attention_forward: Mapping[str, Curve]
    attention_backward: Mapping[str, Curve]
    memory_share: Curve
    kernel_seconds: float
    launch_seconds: float
    overlap: float
    calibrated: str | None = None
    on_gpu: bool = True

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in this dtype ("bfloat16"); UserError where that is not known."""
        if dtype not in self.peak_flops:
            raise UserError(
                f"the device {self.name} has no peak_flops.{dtype}: add it to its description, or"
                f" plan for {' or '.join(self.peak_flops)}"
            )
        return self.peak_flops[dtype]


@dataclass(frozen=True)
class Link:
    """What joins devices of a node, or nodes.

    bandwidth: bytes/s in one direction, of a device inside a node, of an adapter between nodes.
    adapters: of a node, which all its devices share evenly; 1 for each device inside a node.
    attainable: shares of the bandwidth by collective, by bytes of a call.
    latency: seconds from one rank to the next, for each step of an algorithm.
    """

    name: str
    bandwidth: float
    latency: float
    attainable: Mapping[str, Curve]
    adapters: int = 1

    def rate(self, collective: str, size: float) -> float:
        """Bytes/s of a device, or of an adapter, in a collective of so many bytes."""
        return self.bandwidth * self.attainable[collective].at(size)


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike.

    collective_seconds: what every collective takes beside latency and bytes.
    between_nodes: None for a single node.
    host_memory: bytes of a node. host_bandwidth: attainable bytes/s between a device and its host,
        in one direction.
    price: dollars for a device and hour, an assumption that users set.
    host_memory_bandwidth: attainable bytes/s of a node's memory, read and written together, by the
        processors of the host; None where that is not known.
    """

    name: str
    device: Device
    gpus_per_node: int
    within_node: Link
    between_nodes: Link | None
    collective_seconds: float
    host_memory: float
    host_bandwidth: float
    price: float
    host_memory_bandwidth: float | None = None

    @property
    def calibrated(self) -> str | None:
        """When and on what the device was measured; None if it was not."""
        return self.device.calibrated

    def host_seconds(self, nbytes: float) -> float:
        """What a rank's part of the host takes to read and write so many bytes of its memory, while
        all ranks of a node do; UserError where the description does not say."""
        if self.host_memory_bandwidth is None:
            raise UserError(
                f"--cluster {self.name}: its description has no host.memory_bandwidth, which an"
                " optimizer on the host is planned by: add it, or leave offload_optimizer out of"
                " --deepspeed-config"
            )
        return nbytes * self.gpus_per_node / self.host_memory_bandwidth

    def used_by(self, gpus: int) -> Cluster:
        """Its nodes with no more devices than so many, which is how many share a host."""
        return dataclasses.replace(self, gpus_per_node=min(gpus, self.gpus_per_node))

    def check_gpus(self, gpus: int) -> None:
        """Raise UserError unless there can be so many."""
        if gpus > self.gpus_per_node and self.between_nodes is None:
            raise UserError(
                f"--gpus {gpus} is more than the {self.gpus_per_node} of the one node of --cluster"
                f" {self.name}: add between_nodes to its description, or plan for fewer"
            )


def cluster_names() -> list[str]:
    """Those that --cluster knows by name."""
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load_cluster(name_or_file: str) -> Cluster:
    """The cluster of `--cluster NAME|FILE`: a name of `cluster_names`, or a YAML file.

    Raises UserError, in one line with file and key, for what is missing, unknown or absurd.
    """
    path, where = CLUSTERS / f"{name_or_file}.yaml", f"--cluster {name_or_file}"
    if name_or_file not in cluster_names():
        path = Path(name_or_file)
        if not path.exists():
            raise UserError(
                f"{where}: no such file, and no such cluster"
                f"{did_you_mean(name_or_file, cluster_names())} (there are:"
                f" {', '.join(cluster_names())})"
            )
    return _cluster(read_section(path, where))


def load_device(name: str) -> Device:
    """A device of devices/ by its name; UserError where there is none."""
    path = DEVICES / f"{name}.yaml"
    names = sorted(path.stem for path in DEVICES.glob("*.yaml"))
    if name not in names:
        raise UserError(
            f"no device is called {name}{did_you_mean(name, names)} (there are: {', '.join(names)})"
        )
    return _device(read_section(path, f"device {name}"))


def _cluster(section: Section) -> Cluster:
    section.only(
        "name", "device", "gpus_per_node", "within_node", "between_nodes", "collective_seconds",
        "host", "price_per_gpu_hour",
    )  # fmt: skip
    if isinstance(section.raw("device"), str):
        try:
            device = load_device(section.text("device"))
        except UserError as error:
            raise section.error("device", f"cannot be had: {error}") from error
    else:
        device = _device(section.section("device"))
    between = None
    if "between_nodes" in section:
        between = _link(section.section("between_nodes"), adapters=True)
    host = section.section("host")
    host.only("memory", "bandwidth", "attainable", "memory_bandwidth", "memory_attainable")
    return Cluster(
        name=section.text("name"),
        device=device,
        gpus_per_node=section.whole("gpus_per_node", 1, 1024),
        within_node=_link(section.section("within_node"), adapters=False),
        between_nodes=between,
        collective_seconds=section.number("collective_seconds", 0, 1, "seconds"),
        host_memory=host.number("memory", 1e8, 1e15, "bytes"),
        host_bandwidth=host.number("bandwidth", 1e6, 1e13, "bytes/s")
        * host.number("attainable", 0.01, 1),
        price=section.number("price_per_gpu_hour", 0, 1e4, "dollars"),
        host_memory_bandwidth=_host_memory_bandwidth(host),
    )


def _host_memory_bandwidth(host: Section) -> float | None:
    if "memory_bandwidth" not in host:
        return None
    bandwidth = host.number("memory_bandwidth", 1e6, 1e15, "bytes/s")
    return bandwidth * host.number("memory_attainable", 0.01, 1)


def _device(section: Section) -> Device:
    section.only(
        "name", "kind", "memory", "peak_flops", "memory_bandwidth", "attainable", "kernel_seconds",
        "launch_seconds", "overlap", "calibrated",
    )  # fmt: skip
    peaks, shares = section.section("peak_flops"), section.section("attainable")
    peaks.only(*DTYPES)
    shares.only("product", "attention_forward", "attention_backward", "memory_bandwidth")
    dtypes = [dtype for dtype in DTYPES if dtype in peaks]
    return Device(
        name=section.text("name"),
        memory=section.number("memory", 1e8, 1e14, "bytes"),
        peak_flops=peaks.numbers(DTYPES, 1e6, 1e18, "FLOP/s"),
        memory_bandwidth=section.number("memory_bandwidth", 1e7, 1e15, "bytes/s"),
        product=_curves(shares, "product", dtypes),
        attention_forward=_curves(shares, "attention_forward", dtypes),
        attention_backward=_curves(shares, "attention_backward", dtypes),
        memory_share=Curve(shares.table("memory_bandwidth", *_SHARES)),
        kernel_seconds=section.number("kernel_seconds", 0, 1, "seconds"),
        launch_seconds=section.number("launch_seconds", 0, 1, "seconds"),
        overlap=section.number("overlap", 0, 1, "as a share"),
        calibrated=section.text("calibrated") if "calibrated" in section else None,
        on_gpu=_kind(section) == "gpu",
    )


def _kind(section: Section) -> str:
    kind = section.text("kind") if "kind" in section else "gpu"
    if kind not in ("gpu", "cpu"):
        raise section.error("kind", f"is {kind!r}, and must be gpu or cpu")
    return kind


_SHARES = 1e-9, 1, "as a share"


def _curves(section: Section, key: str, names: list[str], others: bool = False):
    """By each of the names a curve: of a mapping its own, else the same for all.

    others: one for those that a mapping leaves out may stand in it, under "others".
    """
    if not isinstance(section.raw(key), dict):
        return dict.fromkeys(names, Curve(section.table(key, *_SHARES)))
    given = section.section(key)
    given.only(*names, *[_OTHERS] * others)
    rest = Curve(given.table(_OTHERS, *_SHARES)) if others and _OTHERS in given else None
    return {
        name: Curve(given.table(name, *_SHARES)) if name in given or rest is None else rest
        for name in names
    }


def _link(section: Section, adapters: bool) -> Link:
    section.only("name", "bandwidth", "latency", "attainable", *["adapters"] * adapters)
    return Link(
        name=section.text("name"),
        bandwidth=section.number("bandwidth", 1e4, 1e14, "bytes/s"),
        latency=section.number("latency", 0, 1, "seconds"),
        attainable=_curves(section, "attainable", list(COLLECTIVES), others=True),
        adapters=section.whole("adapters", 1, 1024) if adapters else 1,
    )
