"""What the Markdown files link to is there."""

import re
import subprocess

import pytest

from tests.launching import REPOSITORY

TRACKED = subprocess.run(
    ["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True
).stdout.split()
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("name", TRACKED)
def test_relative_links_lead_somewhere(name):
    file = REPOSITORY / name
    links = [link for link in LINK.findall(file.read_text()) if "://" not in link]
    missing = [link for link in links if not (file.parent / link).exists()]
    assert not missing
