"""What the host has left, from the files of a stand-in for Linux."""

from pathlib import Path

import pytest

from megalong.utils.machine import host_bytes_available

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        root.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        root.joinpath(name).write_text(f"{text}\n")
    return root


def group(folder: str, version: int, limit: object, used: int, cache: int) -> dict[str, object]:
    top = "sys/fs/cgroup/" if version == 2 else "sys/fs/cgroup/memory/"
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return {
        top + folder + names[0]: limit if limit == "max" else limit * MIB,
        top + folder + names[1]: used * MIB,
        top + folder + "memory.stat": f"anon 5\n{names[2]} {cache * MIB}",
    }


MACHINE = {"proc/meminfo": "MemTotal: 4096 kB\nMemFree: 12 kB\nMemAvailable: 2097152 kB"}  # 2 GiB
V2 = {"proc/self/cgroup": "0::/job/step"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n0::/"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 2048, id="machine"),
        pytest.param(V2 | group("job/step/", 2, "max", 9, 0), 2048, id="no limit"),
        pytest.param(V2 | group("job/step/", 2, 1024, 100, 40), 964, id="version 2"),
        pytest.param(V2 | group("job/", 2, 512, 100, 0), 412, id="a group around it"),
        pytest.param(V2 | group("", 2, 256, 100, 0), 156, id="a container's root"),
        pytest.param(V2 | group("job/", 2, 64, 100, 0), 0, id="full"),
        pytest.param(V2 | group("job/", 2, 9000, 100, 0), 2048, id="a limit above the machine's"),
        pytest.param(V1 | group("job/", 1, 1024, 100, 40), 964, id="version 1"),
        pytest.param(V1 | group("", 1, 128, 100, 0), 28, id="version 1, a container's root"),
    ],
)
def test_the_least_of_all_limits(files, expected, tmp_path):
    assert host_bytes_available(write(tmp_path, MACHINE | files)) == expected * MIB


def test_this_machine_has_some():
    assert 0 < host_bytes_available() < 2**50


def test_another_system_has_its_free_pages(tmp_path):
    assert host_bytes_available(tmp_path) > 0
