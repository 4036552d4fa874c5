"""Names that other libraries do not document: all exist in the installed versions, and stand in the
one file that each library has for them. The operators of PyTorch's attention, and what its tensors
say of themselves, stand apart: the attention and the tiling import nothing else of megalong. So do
those of the parser of commands, which runs where nothing is installed."""

import argparse
import ast
import importlib

import pytest
import torch

from megalong.parallel import deepspeed_private
from megalong.utils import torch_private
from tests.forked import run_ranks
from tests.launching import REPOSITORY

WORKER = __file__.replace("test_private_names", "private_names_worker")
ATTENTION = "megalong/attention/sdpa_operators.py"  # of torch.ops.aten
OFFLOAD = "megalong/model/chunked/offload.py"  # of torch.Tensor
TENSOR_CACHE = "megalong/attention/tensors.py"  # of torch.Tensor
COMMANDS = "megalong/utils/command_line.py"  # of argparse.ArgumentParser
GIGATOKEN = "megalong/data/tokenizers/backend.py"  # of a version's tokenizer, if it has it
FENCES = {
    "megalong/parallel/deepspeed_private.py",
    "megalong/parallel/cpu.py",
    "megalong/utils/torch_private.py",
    ATTENTION,
    OFFLOAD,
    TENSOR_CACHE,
    COMMANDS,
    GIGATOKEN,
}
SOURCES = [
    REPOSITORY / "pretrain_longnet.py",
    *(
        path
        for folder in ("megalong", "tools", "examples")
        for path in (REPOSITORY / folder).rglob("*.py")
    ),
]
# Documented all the same: https://docs.python.org/3, of os, sys and collections.namedtuple.
DOCUMENTED = {"_exit", "_current_frames", "_fields", "_asdict", "_replace", "_make"}


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


@pytest.fixture(scope="module")
def taken() -> dict[str, set[str]]:
    """The private names of others in every file that has such."""
    found = {
        str(path.relative_to(REPOSITORY)): foreign_private_names(path.read_text())
        for path in SOURCES
    }
    return {file: names for file, names in found.items() if names}


def test_private_names_stand_in_their_files(taken):
    assert taken.keys() == FENCES, {file: taken[file] for file in taken.keys() - FENCES}
    listed = {name for names in deepspeed_private.NAMES.values() for name in names}
    assert taken["megalong/parallel/deepspeed_private.py"] <= listed


def test_the_parser_has_its_own(taken):
    assert taken[COMMANDS] <= vars(argparse.ArgumentParser()).keys()


def test_pytorch_has_its_own(taken):
    for module, name in torch_private.CHECKPOINT_CLASSES:
        assert hasattr(importlib.import_module(module), name), (module, name)
    for name in torch_private.COLLECTIVES:
        assert hasattr(torch.ops.c10d, name), name
    listed, with_nccl = torch_private.NAMES, torch_private.NAMES_WITH_NCCL
    assert {name for _, name in listed + with_nccl} == taken["megalong/utils/torch_private.py"]
    operators = [(torch.ops.aten, name) for name in taken[ATTENTION]]
    of_tensors = [(torch.Tensor, name) for name in taken[OFFLOAD] | taken[TENSOR_CACHE]]
    installed = listed + with_nccl if torch.distributed.is_nccl_available() else listed
    for owner, name in (*installed, *operators, *of_tensors):
        assert hasattr(owner, name), (owner, name)


def test_deepspeed_and_megatron_core_have_theirs(corpus):
    """On engines of every kind; and what we do with these names has the effect that we want."""
    run_ranks(1, WORKER, corpus, timeout=600)
