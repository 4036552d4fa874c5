"""Imports run one way: every room's may be read off this table, and no file does otherwise."""

import ast
from pathlib import Path

import pytest

from tests.launching import REPOSITORY

PACKAGE = REPOSITORY / "megalong"

# Room (a folder, or a file beside the folders) -> the rooms it may import. From the bottom up.
ROOMS = {
    "utils": set(),
    "attention": set(),
    "data": {"utils"},
    "evals": {"utils", "data"},
    "config": {"utils", "attention", "data", "evals"},
    "checkpoint": {"utils", "config"},
    "parallel": {"utils", "config", "attention"},
    "model": {"utils", "parallel", "config", "attention"},
    "training": {"utils", "model", "checkpoint", "parallel", "config", "data", "evals"},
    "dry_run": {
        "utils", "training", "model", "parallel", "config", "data", "attention",
    },
    "hf": {"utils", "model", "checkpoint", "config", "data", "evals", "attention"},
    "doctor": {"utils", "training", "attention"},
}  # fmt: skip

# Package -> the rooms, or files, that may import it.
LIBRARIES = {
    "megatron": {"model", "parallel", "data/indexed.py"},
    "deepspeed": {"training", "parallel"},
    "transformers": {"hf", "data/tokenizers/huggingface_tokenizer.py"},
    "triton": {"attention/triton", "model/chunked/triton"},
}

FILES = sorted(PACKAGE.rglob("*.py"))


def modules(path: Path, everywhere: bool = True) -> set[str]:
    """The modules, with what is taken from them, that a file imports; everywhere: in its functions
    too."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_table_has_every_room_and_only_looks_down():
    assert {room(path) for path in FILES} - {"__init__"} == set(ROOMS)
    order = list(ROOMS)
    for name, below in ROOMS.items():
        assert all(order.index(other) < order.index(name) for other in below), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    here = room(path)
    for name in modules(path):
        if not name.startswith("megalong."):
            continue
        other = name.split(".")[1]
        allowed = {here, "__version__"} | ROOMS.get(here, set())
        assert other in allowed, f"{here} must not import {name}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_stay_in_their_rooms(library):
    allowed = tuple(str(PACKAGE / place) for place in LIBRARIES[library])
    found = {str(path) for path in FILES if any(m.split(".")[0] == library for m in modules(path))}
    assert found and {path for path in found if not path.startswith(allowed)} == set()


def test_the_mesh_alone_asks_megatrons_global_state():
    asking = {path.name for path in FILES if "parallel_state" in "".join(modules(path))}
    assert asking == {"mesh.py"}


def test_the_checkpoint_room_alone_names_its_files():
    names = {"latest", "manifest.json", "progress.json", ".metadata", ".distcp", ".damaged"}
    places = [p for p in FILES if room(p) != "checkpoint"] + [*(REPOSITORY / "tools").rglob("*.py")]
    for path in [*places, REPOSITORY / "pretrain_longnet.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names and not node.value.startswith("iter_"), path


def test_hugging_faces_side_needs_neither_megatron_nor_deepspeed():
    seen, coming = set(), {f"megalong.hf.{path.stem}" for path in (PACKAGE / "hf").glob("*.py")}
    while coming:
        name = coming.pop()
        place = PACKAGE.joinpath(*name.split(".")[1:])
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if not path.exists() or path in seen:  # a name inside a module, or known
            continue
        seen.add(path)
        imported = modules(path, everywhere=False)
        assert not {m.split(".")[0] for m in imported} & {"megatron", "deepspeed"}, path
        for module in imported:
            parts = module.split(".")
            coming |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    assert PACKAGE / "model" / "parameters.py" in seen
