"""Names that other libraries do not document: all exist in the installed versions, and stand in the
one file that each library has for them."""

import ast
import importlib
from pathlib import Path

import torch

import megalong
from megalong import torch_private
from megalong.parallel import deepspeed_private
from tests.forked import run_ranks

WORKER = __file__.replace("test_private_names", "private_names_worker")
MEGALONG = Path(megalong.__file__).parent
FENCES = {
    "parallel/deepspeed_private.py",
    "parallel/megatron_private.py",
    "torch_private.py",
    "planning/torch_private.py",
    "attention/sdpa_operators.py",  # PyTorch's attention; that room imports no other
}
# Documented all the same: https://docs.python.org/3, of os and of collections.namedtuple.
DOCUMENTED = {"_exit", "_fields", "_asdict", "_replace", "_make"}


# Whose PyTorch's private names are.
OWNERS = (
    torch.ops.aten,
    torch.cuda.memory,
    torch.distributed.checkpoint.FileSystemReader,
    torch.utils,
    torch.testing,
    torch._C,
    torch,
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def foreign_private_names(source: str) -> set[str]:
    """The private names that the source takes from others: attributes, getattr and imports, but for
    those that it defines itself."""
    found, own = set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                own.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(attr=name):
                found.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, name, *_]):
                found.add(name.value if isinstance(name, ast.Constant) else "")
            case ast.ImportFrom(module=module, names=names) if not module.startswith("megalong"):
                found |= {*module.split("."), *(alias.name for alias in names)}
            case ast.Import(names=names):
                found |= {word for alias in names for word in alias.name.split(".")}
    return {name for name in found - own if is_private(name)}


def test_private_names_stand_in_their_files():
    taken = {
        str(path.relative_to(MEGALONG)): names
        for path in MEGALONG.rglob("*.py")
        if (names := foreign_private_names(path.read_text()))
    }
    assert taken.keys() == FENCES, {file: taken[file] for file in taken.keys() - FENCES}
    listed = {name for names in deepspeed_private.NAMES.values() for name in names}
    assert taken["parallel/deepspeed_private.py"] <= listed


def test_the_search_finds_them():
    source = """
from torch.utils._python_dispatch import A
from torch import _C
from megalong.own import _ours
class Ours:
    def _mine(self):
        self._set = self._mine()
        return self._set, self._inherited, other._attribute, getattr(other, "_by_name"), a.__dict__
"""
    expected = {"_python_dispatch", "_C", "_inherited", "_attribute", "_by_name"}
    assert foreign_private_names(source) == expected


def test_pytorch_has_its_own():
    for module, name in torch_private.CHECKPOINT_CLASSES:
        assert hasattr(importlib.import_module(module), name), (module, name)
    for name in torch_private.COLLECTIVES:
        assert hasattr(torch.ops.c10d, name), name
    for fence in ("torch_private.py", "planning/torch_private.py", "attention/sdpa_operators.py"):
        for name in foreign_private_names((MEGALONG / fence).read_text()):
            assert any(hasattr(owner, name) for owner in OWNERS), name


def test_deepspeed_and_megatron_core_have_theirs(corpus):
    """On engines of every kind; and what we do with these names has the effect that we want."""
    run_ranks(1, WORKER, corpus, timeout=600)
