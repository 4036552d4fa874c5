"""`python -m megalong.doctor`: says what there is and what is missing."""

import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from megalong.doctor import __main__ as doctor
from megalong.doctor import checks
from tests.launching import REPOSITORY, run_here


def test_this_machine_can_train():
    report = run_here(REPOSITORY / "megalong/doctor/__main__.py").stdout
    for words in ("Python", "torch", "megatron-core", "apex", "torchrun", "CPU", "sdpa"):
        assert words in report
    assert "gloo sums" in report or "nccl sums" in report
    assert report.endswith("Training can work here.\n")


@pytest.mark.parametrize(
    "lines, value, advice",
    [
        (["no-such-package>=1"], "not installed", 'python -m pip install "no-such-package>=1"'),
        (["numpy>=99"], None, "needs >=99"),
    ],
)
def test_what_is_missing(monkeypatch, capsys, lines, value, advice):
    monkeypatch.setattr(checks, "requirement_lines", lambda: lines)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    [finding] = checks.needed_packages()
    assert finding.mark == "FAIL" and value in (None, finding.value) and advice in finding.advice
    assert doctor.main() == 1
    assert capsys.readouterr().out.endswith(f"cannot work here yet: {finding.name}.\n")


def test_requirements_are_those_of_the_file():
    names = [line.partition(">")[0] for line in checks.requirement_lines()]
    assert {"torch", "deepspeed", "megatron-core", "numpy"} <= {*names}


def test_optional_packages_are_those_of_the_extras(monkeypatch):
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = {
        (extra, Requirement(line).name)
        for extra, lines in extras["optional-dependencies"].items()
        for line in lines
        if extra != "dev"
    }
    assert {(extra, name) for extra, name, _, _ in checks.OPTIONAL} == {
        (extra, name) for extra, name in listed if name != "megalong"
    }
    findings = {finding.name: finding for finding in checks.optional_packages()}
    assert findings["transformers"].mark == "ok"
    assert findings["transformers"].advice == "Hugging Face tokenizers and models"
    gone = [("data", "x", "no_such_package.module", "X")]
    monkeypatch.setattr(checks, "OPTIONAL", gone)
    missing = checks.optional_packages()[-1]
    assert (missing.mark, missing.value) == ("--", "not installed")
    assert missing.advice == "X; for it: python -m pip install -e '.[data]'"


@pytest.mark.parametrize("module, mark", [("normalization", "ok"), ("models", "--")])
def test_which_apex(monkeypatch, tmp_path, module, mark):
    """NVIDIA's has fused norms; the project that PyPI calls apex has not."""
    (tmp_path / "apex" / module).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    finding = checks.apex()
    assert finding.mark == mark
    assert ("pip uninstall apex" in finding.advice) == (mark == "--")


def test_a_failing_rank_is_shown(monkeypatch):
    # In the place of a Python that cannot import what training needs.
    monkeypatch.setattr(checks.sys, "executable", "/bin/false")
    finding = checks.self_test()
    assert finding.mark == "FAIL" and finding.value == "failed"
