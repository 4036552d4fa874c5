"""Check this machine: `python -m megalong.doctor`.

Says what there is and what is missing, and how to get it, and lets two processes talk to each other
and compute. Exit code 0 where training can work, 1 otherwise.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megalong.utils.command_line import REPOSITORY, ArgumentParser, filter_library_logs, run
from megalong.utils.machine import free_port, use_gpu

SELF_TEST_SECONDS = 120
SELF_TEST_RANK = "--self-test-rank"  # makes this module one of the ranks of its self-test
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


def all_checks() -> Iterator[tuple[str, list[Finding]]]:
    """The sections of the report. What needs a package is left out where that is missing."""
    needed = [python_version(), *needed_packages()]
    yield "Needed", needed
    yield "Optional", [apex(), *optional_packages(), *tools()]
    if all(finding.mark != "FAIL" for finding in needed):
        yield "Devices", devices()
        yield "Attention backends", attention_backends()
        yield "Two processes", [self_test()]


def python_version() -> Finding:
    """The version of this Python."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("ok", "Python", version, "3.11 to 3.13")
    return Finding("FAIL", "Python", version, "needs 3.11 to 3.13: make setup PYTHON=python3.12")


def installed(name: str, version: str | None, use: str, get: str, needed: bool = False) -> Finding:
    """The finding on one package. get: what pip is to install where it is missing."""
    if version is not None:
        return Finding("ok", name, version, use)
    advice = f"{use}; for it: " if use and not needed else ""
    mark = "FAIL" if needed else "--"
    return Finding(mark, name, "not installed", f"{advice}python -m pip install {get}")


def needed_packages() -> list[Finding]:
    """The installed versions against the ranges of requirements.txt."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [installed("packages", None, "", "-r requirements.txt", needed=True)]
    findings = []
    for requirement in map(Requirement, requirement_lines()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        version, get = installed_version(name), f'"{name}{wanted}"'
        # NVIDIA's containers have builds between two releases, like 2.12.0a0.
        if version and not requirement.specifier.contains(version, prereleases=True):
            advice = f"needs {wanted}: python -m pip install {get} --upgrade"
            findings.append(Finding("FAIL", name, version, advice))
        else:
            findings.append(installed(name, version, wanted, get, needed=True))
    return findings


def requirement_lines() -> list[str]:
    """Read requirements.txt where this is a checkout, else what the installed package asks for."""
    file = REPOSITORY / "requirements.txt"
    if not file.exists():
        return importlib.metadata.requires("megalong") or []
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [line for line in lines if line]


def installed_version(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def optional_packages() -> list[Finding]:
    """NVIDIA's layers, and the packages of the extras."""
    engine = "--no-build-isolation 'transformer_engine[pytorch]'"
    packages = [("transformer_engine", "transformer_engine", "NVIDIA's layers", engine)]
    packages += [(name, module, use, f"-e '.[{extra}]'") for extra, name, module, use in OPTIONAL]
    findings = []
    for name, module, use, get in packages:
        version = installed_version(name) or "installed"
        try:
            version = version if find_spec(module) is not None else None
        except ModuleNotFoundError:  # the package above it is missing
            version = None
        findings.append(installed(name, version, use, get))
    return findings


def apex() -> Finding:
    """NVIDIA's apex, which is on no package index; what PyPI calls apex is another project."""
    spec = find_spec("apex")
    if spec is None:
        get = "fused LayerNorm; from github.com/NVIDIA/apex, not from PyPI"
        return Finding("--", "apex", "not installed", get)
    version = installed_version("apex") or "installed"
    folders = spec.submodule_search_locations or []
    if any(Path(folder, "normalization").exists() for folder in folders):
        return Finding("ok", "apex", version, "NVIDIA's")
    remove = "PyPI's, another project: python -m pip uninstall apex"
    return Finding("--", "apex", version, remove)


def tools() -> list[Finding]:
    """Programs that training may start: launchers, and compilers for kernels."""
    findings = []
    for name, advice in (
        ("torchrun", "python -m torch.distributed.run is the same"),
        ("deepspeed", "torchrun does its work"),
        ("srun", "no SLURM here; examples/slurm needs it"),
        ("cc", "Triton needs a C compiler on a GPU: apt-get install gcc"),
        ("nvcc", "only for DeepSpeed's own kernels (--deepspeed-config with offloading)"),
    ):
        path, beside = shutil.which(name), Path(sys.executable).with_name(name)
        if path is not None:
            findings.append(Finding("ok", name, "found", path))
            continue
        if beside.exists():
            advice = f"it is {beside}: activate that environment"
        findings.append(Finding("--", name, "not on PATH", advice))
    return findings


def devices() -> list[Finding]:
    """The processor, the GPUs, and what they share."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0))
    findings = [Finding("ok", "CPU", f"{cores} cores, {memory:.0f} GiB")]
    if not torch.cuda.is_available():
        advice = "training runs on the CPU"
        if Path("/dev/nvidiactl").exists():
            advice = (
                f"there is an NVIDIA driver, but this torch ({torch.__version__}) cannot use it:"
                " install a build for its CUDA version"
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
    """The backends that "auto" can choose from, for inputs as training has them here."""
    import torch

    from megalong.attention import AUTO, BACKENDS

    device = torch.device("cuda" if use_gpu() else "cpu")
    dtype = torch.bfloat16 if use_gpu() else torch.float32
    findings: list[Finding] = []
    for name in AUTO:
        why_not = import_module(BACKENDS[name]).unsupported(device, dtype, head_dim=64)
        chosen = "" if any(finding.mark == "ok" for finding in findings) else "chosen"
        works = Finding("ok", name, "works", chosen)
        findings.append(Finding("--", name, "cannot run", why_not) if why_not else works)
    if all(finding.mark != "ok" for finding in findings):
        findings.append(Finding("FAIL", "attention", "no backend", "see above"))
    return findings


def self_test() -> Finding:
    """Run `rank_of_self_test` on two ranks of this machine."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megalong.doctor", SELF_TEST_RANK],
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
    for rank, output in zip(ranks, outputs, strict=True):
        last_line = (output.strip().splitlines() or ["no output"])[-1]
        if rank.returncode:
            return Finding("FAIL", "self-test", "failed", last_line)
    return Finding("ok", "self-test", outputs[0].strip().splitlines()[-1])


def rank_of_self_test() -> None:
    """Import what training imports, sum over both ranks, and compare dilated attention with its
    definition in float64, forward and backward."""
    start = time.perf_counter()
    filter_library_logs()
    import torch

    import megalong.training.loop  # noqa: F401  # DeepSpeed, Megatron-core and all else
    from megalong.attention import DilatedPattern, dilated_attention, dilated_attention_reference

    rank = int(os.environ["RANK"])
    gpus = torch.cuda.device_count() if use_gpu() else 0
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    backend = "nccl" if gpus > 1 else "gloo"  # NCCL wants a GPU for each rank
    if gpus:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=60))
    total = torch.tensor([rank + 1.0], device=device if backend == "nccl" else "cpu")
    torch.distributed.all_reduce(total)
    if total.item() != 3:
        raise RuntimeError(f"{backend} sums 1 and 2 to {total.item()}")
    torch.manual_seed(1)
    pattern = DilatedPattern((32, 64, 128), (1, 2, 3))
    inputs = [torch.randn(1, 100, heads, 32) for heads in (4, 2, 2)]

    def results(function: Any, tensors: list[Any]) -> list[Any]:
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = function(*tensors, pattern=pattern)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        return [tensor.detach().cpu().double() for tensor in (out, *(t.grad for t in tensors))]

    ours = results(dilated_attention, [tensor.to(device) for tensor in inputs])
    theirs = results(dilated_attention_reference, [tensor.double() for tensor in inputs])
    error = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if error > 1e-2:
        raise RuntimeError(f"dilated attention on {device} is off by {error:.1e}")
    torch.distributed.destroy_process_group()
    seconds = time.perf_counter() - start
    print(f"{backend} sums, attention on {device.type} is right to {error:.0e}, {seconds:.0f} s")


def main() -> int:
    """Print the report. Returns the exit code."""
    ArgumentParser(__doc__, prog="python -m megalong.doctor").parse_args()
    wrong: list[str] = []
    for section, findings in all_checks():
        print(f"\n{section}")
        names = max(len(finding.name) for finding in findings)
        values = max(len(finding.value) for finding in findings)
        for finding in findings:
            line = f"  {finding.mark:4}  {finding.name:{names}}  {finding.value:{values}}"
            print(f"{line}  {finding.advice}".rstrip(), flush=True)
        wrong += [finding.name for finding in findings if finding.mark == "FAIL"]
    if wrong:
        print(f"\nTraining cannot work here yet: {', '.join(wrong)}.")
        return 1
    print("\nTraining can work here.")
    return 0


if __name__ == "__main__":
    run(rank_of_self_test if sys.argv[1:] == [SELF_TEST_RANK] else main)
