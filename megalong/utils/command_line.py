"""How every command begins and ends: its parser, and its last line.

A command is a function. What the user can mend ends it with one line, `error: ...`, on standard
error and exit status 2; anything else is a bug and shows its traceback. What is slow to import or
may be missing, commands import inside their functions, so that `--help` is quick and a Python
without the packages is told what to do. This module needs nothing but the standard library.
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
REQUIRED = ("torch", "triton", "deepspeed", "megatron", "numpy", "sentencepiece", "tensorboard")
REQUIRED += ("yaml", "tqdm", "matplotlib")
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
    """Shows a docstring as it is written, and makes one line of a mistake, not the usage of fifty
    flags."""

    def __init__(
        self, description: str | None, instead: Mapping[str, str] | None = None, **options: Any
    ):
        """instead: of flags that there are not, what to say to those who type them."""
        self.instead = instead or {}
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """The help of a flag ends with its default, unless it speaks of that itself."""
        action = super().add_argument(*names, **options)
        default = action.default
        if action.help and "(default" not in action.help and default not in (None, [], SUPPRESS):
            if isinstance(default, bool):
                default = "on" if default else "off"
            words = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            action.help += f" (default: {words.replace('%', '%%')})"
        return action

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; a flag that is misspelt is found before one that is then missing."""
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
    after the one line of a mistake.

    Mistakes are UserErrors and our requirements that are not installed. Ctrl-C ends it without a
    traceback.
    system_errors: errors of the operating system that name a file, too; not in a command that makes
        UserErrors of those of its flags itself (`system_errors_of`), where others are of a library,
        such as no compiler for Triton.
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
    """Inside, one of our requirements that is not installed ends the process with the one line that
    says how to get it: for imports at the beginning of a script."""
    try:
        yield
    except ModuleNotFoundError as error:
        # A module inside an installed package, or one that only such a package needs, is a bug.
        if error.name not in REQUIRED + HUGGING_FACE:
            raise
        _end(_how_to_get(error.name))


def _end(message: str) -> NoReturn:
    # Every rank finds a wrong flag, and one of them should say so: the launchers end the others
    # when the first process is gone. What only this rank has found, it says all the same.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(5 if os.environ.get("LOCAL_RANK") == "0" else 15)
    print(f"error: {message}", file=sys.stderr)
    _tell_torchrun(f"error: {message}")
    sys.exit(2)


def _tell_torchrun(line: str) -> None:
    """Have torchrun end what it prints of a failed rank with this line."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": told}}))


def _how_to_get(package: str) -> str:
    """What to do where a package is missing."""
    message = f"{package} is not installed for {sys.executable}: "
    if package in HUGGING_FACE:
        return message + "pip install -e '.[hf]'"
    environment = REPOSITORY / ".venv"
    if environment.exists() and Path(sys.prefix).resolve() != environment.resolve():
        return message + f"`. {environment}/bin/activate` enters the environment that has it"
    return message + f"`make setup` in {REPOSITORY} makes .venv, `. .venv/bin/activate` enters it"


def filter_library_logs() -> None:
    """Silence them in this process. Called before megatron.core and deepspeed are imported."""
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
    """From now on SIGUSR1, by which schedulers ask a run to stop, is kept in the list that this
    returns, and SIGINT ends the process at once, without a traceback.

    SIGTERM does so anyway: by it launchers end the other ranks when one has found a mistake.
    """
    asked: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell sets for background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return asked
