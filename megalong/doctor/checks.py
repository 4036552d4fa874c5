"""The doctor's checks: each returns findings, and none of them raises."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megalong.utils.machine import free_port

REPOSITORY = Path(__file__).resolve().parent.parent.parent
GET_ALL = "python -m pip install -r requirements.txt"
SELF_TEST_SECONDS = 120
# Of the extras of pyproject.toml: the extra, the package, its module, and what it is for.
OPTIONAL = (
    ("hf", "transformers", "transformers", "Hugging Face tokenizers and models"),
    ("hf", "safetensors", "safetensors", "weights of Hugging Face models"),
    ("hf", "accelerate", "accelerate", "Transformers' Trainer"),
    ("eval", "lm-eval", "lm_eval", "tasks of the Language Model Evaluation Harness"),
    ("data", "pyarrow", "pyarrow", "text in Parquet"),
    ("data", "backports.zstd", "backports.zstd", "text compressed with Zstandard"),
    ("data", "tiktoken", "tiktoken", "--tokenizer-type TikTokenizer"),
    ("data", "gigatoken", "gigatoken", "--tokenizer-backend fast"),
)
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report. mark: "ok"; "--", not there and not needed, or worth knowing;
    "FAIL", without which training cannot work."""

    mark: str
    name: str
    value: str
    advice: str = ""


def can_train(findings: list[Finding]) -> bool:
    return all(finding.mark != "FAIL" for finding in findings)


def all_checks() -> Iterator[tuple[str, list[Finding]]]:
    """The sections of the report. What needs a package is left out where that is missing."""
    needed = [python_version(), *needed_packages()]
    yield "Needed", needed
    yield "Optional", [*optional_packages(), *tools()]
    if can_train(needed):
        yield "Devices", devices()
        yield "Attention backends", attention_backends()
        yield "Two processes", [self_test()]


def python_version() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("ok", "Python", version, "3.11 to 3.13")
    return Finding("FAIL", "Python", version, "needs 3.11 to 3.13: make setup PYTHON=python3.12")


def needed_packages() -> list[Finding]:
    """The installed versions against the ranges of requirements.txt."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [Finding("FAIL", "packages", "not installed", GET_ALL)]
    findings = []
    for line in requirement_lines():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, wanted = installed_version(requirement.name), str(requirement.specifier)
        get = f'python -m pip install "{requirement.name}{wanted}"'
        if version is None:
            findings.append(Finding("FAIL", requirement.name, "not installed", get))
        # NVIDIA's containers have builds between two releases, like 2.12.0a0.
        elif not requirement.specifier.contains(version, prereleases=True):
            findings.append(
                Finding("FAIL", requirement.name, version, f"needs {wanted}: {get} --upgrade")
            )
        else:
            findings.append(Finding("ok", requirement.name, version, wanted))
    return findings


def requirement_lines() -> list[str]:
    """Of requirements.txt where this is a checkout, else of the installed package."""
    file = REPOSITORY / "requirements.txt"
    if not file.exists():
        return importlib.metadata.requires("megalong") or []
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_packages() -> list[Finding]:
    """NVIDIA's, and those of the extras."""
    engine = "--no-build-isolation 'transformer_engine[pytorch]'"
    packages = [("transformer_engine", "transformer_engine", "NVIDIA's layers", engine)]
    packages += [(name, module, use, f"-e '.[{extra}]'") for extra, name, module, use in OPTIONAL]
    findings = [apex()]
    for name, module, use, get in packages:
        if is_there(module):
            findings.append(Finding("ok", name, installed_version(name) or "installed", use))
        else:
            advice = f"{use}; for it: python -m pip install {get}"
            findings.append(Finding("--", name, "not installed", advice))
    return findings


def is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it is not
        return False


def apex() -> Finding:
    """NVIDIA's apex is on no package index; what PyPI calls apex is another project."""
    spec = find_spec("apex")
    if spec is None:
        get = "fused LayerNorm; from github.com/NVIDIA/apex, not from PyPI"
        return Finding("--", "apex", "not installed", get)
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / "normalization").exists() for folder in folders):
        return Finding("ok", "apex", installed_version("apex") or "installed", "NVIDIA's")
    remove = "PyPI's, another project: python -m pip uninstall apex"
    return Finding("--", "apex", installed_version("apex") or "installed", remove)


def tools() -> list[Finding]:
    """Programs that training may start: launchers, and compilers for kernels."""
    findings = []
    for name, without in (
        ("torchrun", "python -m torch.distributed.run is the same"),
        ("deepspeed", "torchrun does its work"),
        ("srun", "no SLURM here; examples/slurm needs it"),
        ("cc", "Triton needs a C compiler on a GPU: apt-get install gcc"),
        ("nvcc", "only for DeepSpeed's own kernels (--deepspeed-config with offloading)"),
    ):
        path, beside = shutil.which(name), Path(sys.executable).with_name(name)
        if path is not None:
            findings.append(Finding("ok", name, "found", path))
        elif beside.exists():
            activate = f"it is {beside}: activate that environment"
            findings.append(Finding("--", name, "not on PATH", activate))
        else:
            findings.append(Finding("--", name, "not on PATH", without))
    return findings


def devices() -> list[Finding]:
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    findings = [Finding("ok", "CPU", f"{cores} cores, {memory:.0f} GiB")]
    if not torch.cuda.is_available():
        advice = "training runs on the CPU"
        if Path("/dev/nvidiactl").exists():
            advice = (
                "there is an NVIDIA driver, but this torch"
                f" ({torch.__version__}) cannot use it: install a build for its CUDA version"
            )
        return [*findings, Finding("--", "GPU", "none", advice)]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        value = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        findings.append(Finding("ok", f"GPU {index}", value))
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        findings.append(Finding("--", "DS_ACCELERATOR", "cpu", "keeps training off the GPU"))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings.append(Finding("ok", "CUDA, NCCL", f"{torch.version.cuda}, {nccl}"))
    shared = os.statvfs("/dev/shm")
    shared_gib = shared.f_frsize * shared.f_blocks / GIB
    if shared_gib < 1:
        advice = "too little for NCCL and data workers: docker run --ipc=host or --shm-size=8g"
        findings.append(Finding("--", "/dev/shm", f"{shared_gib:.2f} GiB", advice))
    return findings


def attention_backends() -> list[Finding]:
    """Those that "auto" can choose from, for inputs as training has them here."""
    from importlib import import_module

    import torch

    from megalong.attention import AUTO, BACKENDS
    from megalong.utils.machine import use_gpu

    device = torch.device("cuda" if use_gpu() else "cpu")
    dtype = torch.bfloat16 if use_gpu() else torch.float32
    findings, chosen = [], False
    for name in AUTO:
        why_not = import_module(BACKENDS[name]).unsupported(device, dtype, head_dim=64)
        if why_not is None:
            findings.append(Finding("ok", name, "works", "" if chosen else "chosen"))
            chosen = True
        else:
            findings.append(Finding("--", name, "cannot run", why_not))
    if not chosen:
        findings.append(Finding("FAIL", "attention", "no backend", "see above"))
    return findings


def self_test() -> Finding:
    """Two ranks on this machine: see `megalong.doctor.self_test`."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megalong.doctor.self_test"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=SELF_TEST_SECONDS)[0] for rank in ranks]
    except subprocess.TimeoutExpired:
        advice = "a firewall, or a host name that does not resolve? Try GLOO_SOCKET_IFNAME=lo"
        return Finding("FAIL", "self-test", f"no end in {SELF_TEST_SECONDS} s", advice)
    finally:
        for rank in ranks:
            rank.kill()
    last_lines = [(output.strip().splitlines() or ["no output"])[-1] for output in outputs]
    failed = [rank.returncode for rank in ranks]
    if any(failed):
        return Finding("FAIL", "self-test", "failed", last_lines[0 if failed[0] else 1])
    return Finding("ok", "self-test", last_lines[0])
