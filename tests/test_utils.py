"""The modules of megalong.utils that other tests do not come by: errors, memory, ports, filters."""

import logging
import socket
from pathlib import Path

import pytest

from megalong.utils.command_line import filter_library_logs
from megalong.utils.errors import UserError, system_errors_of
from megalong.utils.machine import check_master_port, free_port, host_bytes_available

MIB = 2**20


@pytest.mark.parametrize(
    "error, message",
    [
        (PermissionError(13, "Permission denied", "run"), "--load run: Permission denied"),
        (PermissionError(13, "Permission denied", "run/x"), "--load run: run/x: Permission denied"),
        (OSError("of a library's own"), "--load run: of a library's own"),
    ],
)
def test_an_error_of_the_system_names_the_flag_the_file_and_the_reason(error, message):
    with pytest.raises(UserError) as raised, system_errors_of("--load", "run"):
        raise error
    assert str(raised.value) == message and raised.value.__cause__ is error


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
        pytest.param(V1 | group("job/", 1, 1024, 100, 40), 964, id="version 1"),
        pytest.param(V1 | group("", 1, 128, 100, 0), 28, id="version 1, a container's root"),
    ],
)
def test_the_host_has_the_least_of_all_limits(files, expected, tmp_path):
    assert host_bytes_available(write(tmp_path, MACHINE | files)) == expected * MIB


def test_other_systems_have_their_free_pages(tmp_path):
    assert 0 < host_bytes_available() < 2**50 and host_bytes_available(tmp_path) > 0


def test_a_port_that_is_taken(monkeypatch):
    """Found before anything slow is imported, by the rank that would listen there, unless that is
    torchrun."""
    port = free_port()
    with socket.create_server(("", port)):
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match="--master_port"):
            check_master_port()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_master_port()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    check_master_port()
    for no_port in ("http", "70000"):
        monkeypatch.setenv("MASTER_PORT", no_port)
        with pytest.raises(UserError, match=f"MASTER_PORT is '{no_port}'"):
            check_master_port()


@pytest.mark.parametrize(
    "module, false",
    [
        ("configuration_utils", "a model of type `longnet` to instantiate a model of type ``"),
        ("tokenization_utils_base", "Token indices sequence length is longer than the specified"),
    ],
)
def test_only_false_warnings_of_transformers_are_silenced(module, false, caplog, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    filter_library_logs()
    logger = logging.getLogger(f"transformers.{module}")
    monkeypatch.setattr(logger.parent, "propagate", True)  # Transformers has a handler of its own
    for message in (false, "a model of type `llama` to instantiate a model of type `longnet`."):
        logger.warning(message)
    assert {record.getMessage()[:22] for record in caplog.records} == {"a model of type `llama"}
