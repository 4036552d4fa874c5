"""What the Markdown files link to is there."""

import re
import shutil
import subprocess

import pytest

from tests.launching import REPOSITORY

CLONE = (REPOSITORY / ".git").exists() and shutil.which("git") is not None
TRACKED = (
    subprocess.run(
        ["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True
    ).stdout.split()
    if CLONE
    else []
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.skipif(not CLONE, reason="which files there are is asked of git, and this is no clone")
def test_there_is_something_to_look_at():
    assert {"README.md", "docs/results.md"} <= {*TRACKED}
    assert LINK.findall((REPOSITORY / "README.md").read_text())


@pytest.mark.parametrize("name", TRACKED)
def test_relative_links_lead_somewhere(name):
    file = REPOSITORY / name
    links = [link for link in LINK.findall(file.read_text()) if "://" not in link]
    missing = [link for link in links if not (file.parent / link).exists()]
    assert not missing
