"""Carry out the Dockerfile without Docker, as far as that goes: `make docker-check`.

A fresh virtual environment stands for the base image's Python, a temporary folder for the image's
file system. COPY copies what .dockerignore leaves, RUN steps run in a clean environment (those that
only root can carry out are parsed by bash), and at the end CMD has to work. Takes minutes: it
installs everything.
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ROOT_ONLY = re.compile(r"\b(apt-get|useradd|chown)\b")
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, arguments), comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


class Image:
    """A folder that stands for the image, and what the instructions have set so far."""

    def __init__(self, folder: Path):
        self.root, self.home = folder / "root", folder / "home"
        self.root.mkdir()
        self.home.mkdir()
        venv.create(folder / "python", with_pip=True)
        # Where packages come from is this machine's business, and no other of its variables.
        kept = ("PIP_", "SSL_", "HTTP", "NO_PROXY", "REQUESTS_")
        self.environment = {k: v for k, v in os.environ.items() if k.upper().startswith(kept)}
        self.environment |= {"HOME": str(self.home), "LANG": "C.UTF-8"}
        self.environment["PATH"] = f"{folder / 'python' / 'bin'}:/usr/local/bin:/usr/bin:/bin"
        self.workdir, self.user = "/", "root"
        self.arguments: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Where a path of the image, relative to WORKDIR, lies on this machine."""
        return self.root / os.path.normpath(os.path.join(self.workdir, name)).lstrip("/")

    def run(self, *command: str) -> None:
        subprocess.run(command, cwd=self.path("."), env=self.environment, check=True)

    def carry_out(self, instruction: str, rest: str) -> None:
        """One instruction; raises where it cannot work."""
        if instruction == "ARG":
            name, _, default = rest.partition("=")
            self.arguments[name] = self.environment[name] = default
        elif instruction == "FROM":
            base = re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], rest)
            assert re.fullmatch(r"[a-z0-9./-]+:[\w.-]+", base), f"{base} is not IMAGE:TAG"
        elif instruction == "ENV":
            self.environment |= dict(pair.split("=", 1) for pair in rest.split())
        elif instruction == "WORKDIR":
            self.workdir = os.path.join(self.workdir, rest)
            self.path(".").mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            self.user = rest
        elif instruction == "COPY":
            *sources, target = (word for word in rest.split() if not word.startswith("--"))
            if target.endswith("/"):
                self.path(target).mkdir(parents=True)
            for source in sources:
                copy(source, self.path(target))
        elif instruction == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
            if ROOT_ONLY.search(rest):
                print("   (for root: parsed only)")
            else:
                self.run("bash", "-c", rest)
        elif instruction == "CMD":
            assert self.user != "root", "no USER before CMD"
            self.run(*json.loads(rest))
        else:
            raise ValueError(f"{instruction}: this check knows {', '.join(sorted(KNOWN))}")


def copy(source: str, target: Path) -> None:
    """COPY of a file or of the whole build context."""
    if source != ".":
        shutil.copy(REPOSITORY / source, target)
        return
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]

    def ignored(folder: str, names: list[str]) -> set[str]:
        inside = Path(folder).relative_to(REPOSITORY)
        return {n for n in names if any(matches(str(inside / n), p) for p in patterns)}

    shutil.copytree(REPOSITORY, target, ignore=ignored, dirs_exist_ok=True)


def matches(path: str, pattern: str) -> bool:
    """Docker's rule: a pattern is for the top folder, or with **/ for any."""
    if pattern.startswith("**/"):
        return fnmatch.fnmatch(path.rpartition("/")[2], pattern[3:])
    return "/" not in path and fnmatch.fnmatch(path, pattern)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = Image(Path(folder))
        for instruction, rest in instructions((REPOSITORY / "Dockerfile").read_text()):
            print(f"== {instruction} {' '.join(rest.split())}", flush=True)
            image.carry_out(instruction, rest)
    print("\nThe Dockerfile's steps work.")


if __name__ == "__main__":
    sys.exit(main())
