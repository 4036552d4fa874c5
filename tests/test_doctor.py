"""`python -m megalong.doctor`: says what there is and what is missing."""

import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from megalong import doctor
from tests.launching import REPOSITORY, run_here


def test_this_machine_can_train():
    report = run_here(REPOSITORY / "megalong/doctor.py").stdout
    for words in ("Python", "torch", "megatron-core", "apex", "torchrun", "CPU", "sdpa"):
        assert words in report
    assert "gloo sums" in report or "nccl sums" in report
    assert report.endswith("Training can work here.\n")


@pytest.mark.parametrize(
    "line, value, advice",
    [
        ("no-such-package>=1", "not installed", 'python -m pip install "no-such-package>=1"'),
        ("numpy>=99", None, "needs >=99"),
    ],
)
def test_what_is_missing(monkeypatch, capsys, line, value, advice):
    monkeypatch.setattr(doctor, "requirement_lines", lambda: [line])
    monkeypatch.setattr(sys, "argv", ["doctor"])
    [finding] = doctor.needed_packages()
    assert finding.mark == "FAIL" and value in (None, finding.value) and advice in finding.advice
    assert doctor.main() == 1
    assert capsys.readouterr().out.endswith(f"cannot work here yet: {finding.name}.\n")


def test_optional_packages_are_those_of_the_extras(monkeypatch):
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    listed = {
        (extra, Requirement(line).name)
        for extra, lines in extras["optional-dependencies"].items()
        for line in lines
        if extra != "dev"
    }
    assert {(extra, name) for extra, name, _, _ in doctor.OPTIONAL} == {
        (extra, name) for extra, name in listed if name != "megalong"
    }
    gone = [("data", "x", "no_such_package.module", "X")]
    monkeypatch.setattr(doctor, "OPTIONAL", gone)
    missing = doctor.optional_packages()[-1]
    assert (missing.mark, missing.value) == ("--", "not installed")
    assert missing.advice == "X; for it: python -m pip install -e '.[data]'"


@pytest.mark.parametrize("module, mark", [("normalization", "ok"), ("models", "--")])
def test_which_apex(monkeypatch, tmp_path, module, mark):
    """NVIDIA's has fused norms; the project that PyPI calls apex has not."""
    (tmp_path / "apex" / module).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor.apex()
    assert finding.mark == mark
    assert ("pip uninstall apex" in finding.advice) == (mark == "--")


def test_a_failing_rank_is_shown(monkeypatch):
    # In the place of a Python that cannot import what training needs.
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    finding = doctor.self_test()
    assert finding.mark == "FAIL" and finding.value == "failed"
