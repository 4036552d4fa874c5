"""The committed results of the experiments: tables are what their cells' JSON gives."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.launching import REPOSITORY

FOLDER = REPOSITORY / "examples" / "experiments"
sys.path.insert(0, str(FOLDER))
from another_seed import write_check  # noqa: E402
from report import read_cells, write_report  # noqa: E402

RESULTS = sorted(path.parent for path in (FOLDER / "results").glob("*/cells"))
CHECKED = sorted(path.parent for path in (FOLDER / "results").glob("*/another_seed"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_the_committed_cells(tmp_path: Path, folder: Path):
    shutil.copytree(folder / "cells", tmp_path / "cells")
    write_report(tmp_path)
    for name in ("report.md", "report.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text(), name
    assert sorted(path.name for path in tmp_path.glob("*.png")) == sorted(
        path.name for path in folder.glob("*.png")
    )
    in_docs = (REPOSITORY / "docs" / "results.md").read_text()
    parts = (folder / "report.md").read_text().split("\n\n")
    tables = [part.strip("\n") for part in parts if part[:1] == "|"]
    assert tables and not [table for table in tables if table not in in_docs]
    assert all(f"{folder.name}/{path.name}" in in_docs for path in folder.glob("*.png"))


@pytest.mark.parametrize("folder", CHECKED, ids=lambda folder: folder.name)
def test_the_committed_check_by_another_seed_is_that_of_its_cells(tmp_path: Path, folder: Path):
    for name in ("cells", "another_seed"):
        shutil.copytree(folder / name, tmp_path / name)
    write_check(tmp_path, read_cells(folder / "another_seed")[0]["seed"])
    name = "another_seed.md"
    assert (tmp_path / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_committed_cells_name_where_they_come_from_and_no_path_of_a_machine(folder: Path):
    for cell in read_cells(folder / "cells") + read_cells(folder / "another_seed"):
        assert cell["complete"] and cell["commands"] and cell["date"]
        commits = [*cell["trained_by_commits"], cell["commit"]]
        assert len(commits) > 1 and not [name for name in commits if not name or name[-1] == "+"]
        words = " ".join(cell["commands"])
        assert not [word for word in words.split() if word.startswith("/")]
