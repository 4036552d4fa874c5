"""How every command begins and ends: its parser, and its last line.

A command is a function. What the user can mend ends it with one line, `error: ...`, on standard
error and exit status 2; anything else is a bug and shows its traceback. What is slow to import or
may be missing, commands import inside their functions, so that `--help` is quick and a Python
without the packages is told what to do. This module needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megalong.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
# What our modules import: of requirements.txt, and of the extra "hf" of pyproject.toml.
REQUIRED = ("torch", "triton", "deepspeed", "megatron", "numpy", "sentencepiece", "tensorboard")
REQUIRED += ("yaml", "tqdm", "matplotlib")
HUGGING_FACE = ("transformers", "tokenizers", "safetensors")


class ArgumentParser(argparse.ArgumentParser):
    """Shows a docstring as it is written, and makes one line of a mistake, not the usage of fifty
    flags."""

    def __init__(self, description: str | None, **options: Any):
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all flags")


def run(command: Callable[[], int | None], system_errors: bool = True) -> NoReturn:
    """Call a command and end the process: with the status that it returns (None is 0), or with 2
    after the one line of a mistake.

    Mistakes are UserErrors and our requirements that are not installed.
    system_errors: errors of the operating system that name a file, too; not in a command that makes
        UserErrors of those of its flags itself (`system_errors_of`), where others are of a library,
        such as no compiler for Triton.
    """
    try:
        sys.exit(command())
    except UserError as error:
        _end(str(error))
    except ModuleNotFoundError as error:
        # A module inside an installed package, or one that only such a package needs, is a bug.
        if error.name not in REQUIRED + HUGGING_FACE:
            raise
        _end(_how_to_get(error.name))
    except OSError as error:
        if error.filename is None or not system_errors:
            raise
        _end(f"{error.filename}: {error.strerror}")


def _end(message: str) -> NoReturn:
    # Every rank finds a wrong flag, and one of them should say so: the launcher ends the others
    # when the first process is gone. What only this rank has found, it says all the same.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _how_to_get(package: str) -> str:
    """What to do where a package is missing."""
    message = f"{package} is not installed for {sys.executable}: "
    if package in HUGGING_FACE:
        return message + "pip install -e '.[hf]'"
    environment = REPOSITORY / ".venv"
    if environment.exists() and Path(sys.prefix).resolve() != environment.resolve():
        return message + f"`. {environment}/bin/activate` enters the environment that has it"
    return message + f"`make setup` in {REPOSITORY} makes .venv, `. .venv/bin/activate` enters it"
