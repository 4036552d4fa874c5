"""The beginning and the end of every command: its parser, its signals, its logs, its last line.

A command is a function. A mistake that the user can mend ends it with one line, `error: ...`, and
exit status 2; anything else is a bug and shows its traceback. Commands import what is slow or may
be missing inside their functions: `--help` is quick, and a Python without the packages is told what
to do. This module needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import time
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megalong.utils.errors import UserError, did_you_mean

REPOSITORY = Path(__file__).resolve().parent.parent.parent
# What our modules import: of requirements.txt, and of the extra "hf" of pyproject.toml.
REQUIRED = (
    "torch", "triton", "deepspeed", "megatron", "numpy", "sentencepiece", "tensorboard", "yaml",
    "tqdm", "matplotlib",
)  # fmt: skip
HUGGING_FACE = ("transformers", "tokenizers", "safetensors")

_WARNINGS = (
    r".*(Apex is|Transformer Engine and Apex are) not installed",
    r".*full scope is deprecated",
    r".*torch.distributed.*is deprecated",
    r".*torch.distributed is disabled, unavailable or uninitialized",
)
# Of Transformers, by logger: a class that reads any model's configuration has no type of its own,
# and texts are cut to their length after they were tokenized.
_TRANSFORMERS = {
    "transformers.configuration_utils": "to instantiate a model of type ``",
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
}
_WITHOUT_GPU = (r".*CUDA_DEVICE_MAX_CONNECTIONS",)  # a setting that Megatron-core wants for GPUs


class ArgumentParser(argparse.ArgumentParser):
    """A parser that shows a docstring as it is written, and makes one line of a mistake."""

    def __init__(
        self, description: str | None, instead: Mapping[str, str] | None = None, **options: Any
    ):
        """instead: of flags that there are not, what to say to those who type them."""
        self.instead = instead or {}
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add a flag whose help ends with its default, unless it speaks of that itself."""
        action = super().add_argument(*names, **options)
        default = action.default
        if action.help and "(default" not in action.help and default not in (None, [], SUPPRESS):
            if isinstance(default, bool):
                default = "on" if default else "off"
            words = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            action.help += f" (default: {words.replace('%', '%%')})"
        return action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; a misspelt flag is found before one that is then missing."""
        options = self._option_string_actions
        if self._subparsers is not None:  # they have options of their own
            return super().parse_args(args, namespace)
        for word in sys.argv[1:] if args is None else args:
            flag = word.partition("=")[0]
            if word == "--":
                break
            if not flag.startswith("--") or " " in flag or flag in options:
                continue
            if flag in self.instead:
                raise UserError(f"{flag}: {self.instead[flag]}")
            if not (self.allow_abbrev and any(option.startswith(flag) for option in options)):
                self.error(f"unrecognized argument: {flag}{did_you_mean(flag, options)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists all flags")


def run(command: Callable[[], int | None], system_errors: bool = True) -> NoReturn:
    """Call a command and end the process: with the status that it returns (None is 0), or with 2
    after the one line of a mistake, a UserError or a requirement that is not installed.

    system_errors: an error of the operating system that names a file is a mistake, too; not in a
        command that makes UserErrors of those of its flags itself (`system_errors_of`), where
        others are of a library, such as no compiler for Triton.
    """
    try:
        with needed_packages():
            sys.exit(command())
    except UserError as error:
        _end(str(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and system_errors:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        if error.filename is None or not system_errors:
            raise
        _end(f"{error.filename}: {error.strerror}")


@contextlib.contextmanager
def needed_packages() -> Iterator[None]:
    """End the process with the one line that says how to get it where a requirement of ours that is
    imported inside is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        # A module inside an installed package, or one that only such a package needs, is a bug.
        if error.name not in REQUIRED + HUGGING_FACE:
            raise
        message = f"{error.name} is not installed for {sys.executable}: "
        environment = REPOSITORY / ".venv"
        if error.name in HUGGING_FACE:
            _end(message + "pip install -e '.[hf]'")
        if environment.exists() and Path(sys.prefix).resolve() != environment.resolve():
            _end(message + f"`. {environment}/bin/activate` enters the environment that has it")
        made = f"`make setup` in {REPOSITORY} makes .venv, `. .venv/bin/activate` enters it"
        _end(message + made)


def _end(message: str) -> NoReturn:
    # Every rank finds a wrong flag, and one of them should say so: the launchers end the others
    # when the first process is gone. What only this rank has found, it says all the same.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5 if os.environ.get("LOCAL_RANK") == "0" else 15)
    line = f"error: {message}"
    print(line, file=sys.stderr)
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:  # torchrun ends what it prints of a failed rank with this line
        told = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": told}}))
    sys.exit(2)


def filter_library_logs() -> None:
    """Silence wrong warnings of libraries in this process, before it imports megatron.core and
    deepspeed."""
    from megalong.utils.machine import use_gpu

    for message in _WARNINGS if use_gpu() else _WARNINGS + _WITHOUT_GPU:
        warnings.filterwarnings("ignore", message=message)
    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    # Its word for all optimizers but Adam and its own; ours are tested with every ZeRO stage.
    deepspeed.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    for name, words in _TRANSFORMERS.items():
        logging.getLogger(name).addFilter(
            lambda record, words=words: words not in record.getMessage()
        )
    if not use_gpu():
        # Names the device that DeepSpeed would find, and warn about, by itself.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def remember_requests() -> list[int]:
    """Keep SIGUSR1, by which schedulers ask a run to stop, in the list that this returns, and let
    SIGINT end the process at once, as SIGTERM does, by which launchers end the other ranks."""
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell sets for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return asked
