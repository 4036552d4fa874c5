"""Speed and memory of tools/preprocess_data.py beside what else tokenizes the same text.

    python tools/benchmarks/preprocess.py --sources /usr/src/linux --work /tmp/preprocess \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 2 \\
        --megatron ~/Megatron-LM --output runs/preprocess

makes documents of folders of source code in --work (a directory's own files are one document, so
that they are long), and then has these tokenize them, taking turns, --rounds times:

    ours       tools/preprocess_data.py --tokenizer-backend usual
    fast       tools/preprocess_data.py --tokenizer-backend fast
    megatron   Megatron-LM's tools/preprocess_data.py, of a clone that --megatron names

Of each: seconds of the whole command, megabytes and tokens a second, processor seconds of all its
processes (which tell most on a machine with other work), and their peak memory, shared pages
counted once. Checked: all make the same tokens. Documents with U+2581 are left out, which
SentencePiece's library, and so Megatron-LM, takes for a space. Writes preprocess.json,
preprocess.md and preprocess.png into --output; what was measured there with the same settings is
not measured again, so that the contenders may come one by one.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.data.formats import texts_of_folder
from megalong.data.tokenizers.tokenizer import (
    SENTENCEPIECE_SPACE,
    TOKENIZERS,
    build_tokenizer,
)
from megalong.utils.command_line import REPOSITORY, ArgumentParser, needed_packages
from megalong.utils.command_line import run as run_command
from megalong.utils.errors import UserError

with needed_packages():
    import numpy as np
    import psutil
    from common import axes_of, write

    from megalong.data.indexed import Pair

CONTENDERS = ("ours", "fast", "megatron")
_LARGEST_FILE = 1 << 20


def main() -> None:
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    corpus = args.work / f"corpus_{args.max_bytes}.jsonl"
    if not corpus.exists():
        write_corpus(args.sources, corpus, args.max_bytes)
    text_bytes, documents = measure_corpus(corpus)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    print(f"{corpus}: {documents:,} documents, {text_bytes:,} bytes of text", flush=True)
    settings = {
        "text_bytes": text_bytes,
        "documents": documents,
        "tokenizer": args.tokenizer_type,
        "fingerprint": tokenizer.fingerprint,
        "workers": args.workers,
    }
    runs = runs_so_far(args, settings)
    for round_number in range(args.rounds):
        # Each starts as often first as it does last.
        order = args.contenders if round_number % 2 == 0 else args.contenders[::-1]
        for name in order:
            if len(runs.setdefault(name, [])) > round_number:
                continue
            runs[name].append(run(command_of(name, args, corpus), args, name) | made_by(name, args))
            print(line_of(name, runs[name], text_bytes), flush=True)
            write(args.output / "preprocess.json", {"settings": settings, "runs": runs})
    header = ("", "rounds", "seconds", "MB/s", "tokens/s", "processor seconds", "peak memory")
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    names = [name for name in CONTENDERS if runs.get(name)]
    lines += [line_of(name, runs[name], text_bytes) for name in names]
    (args.output / "preprocess.md").write_text("\n".join(lines) + "\n")
    figure, (axes,) = axes_of()
    axes.bar(
        names, [median(runs[name], "tokens") / median(runs[name], "seconds") for name in names]
    )
    axes.set(ylabel="tokens/s")
    figure.savefig(args.output / "preprocess.png", dpi=80)
    check_same(args, runs)


def check_same(args: argparse.Namespace, runs: dict[str, list[dict]]) -> None:
    """Raise UserError where contenders have made other tokens."""
    tokens = {name: rows[0]["tokens"] for name, rows in runs.items() if rows}
    if len(set(tokens.values())) > 1:
        raise UserError(f"not the same number of tokens: {tokens}")
    first, *others = [prefix_of(name, args) for name in args.contenders]
    for other, suffix in itertools.product(others, (".bin", ".idx")):
        if not filecmp.cmp(first + suffix, other + suffix, shallow=False):
            raise UserError(f"{first + suffix} and {other + suffix} differ")
    print(f"as many tokens: {', '.join(tokens)}")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--sources", nargs="*", default=[], type=Path, help="folders of source code")
    add("--work", type=Path, required=True, help="folder for the corpus and what is written")
    add("--output", type=Path, help="folder for the results")
    add("--max-bytes", type=int, default=400_000_000, help="of text")
    add("--tokenizer-type", default="SentencePieceTokenizer", choices=list(TOKENIZERS))
    add("--tokenizer-model")
    add("--workers", type=int, default=os.cpu_count())
    add("--rounds", type=int, default=3)
    add("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    add("--megatron", type=Path, help="a clone of Megatron-LM")
    args = parser.parse_args()
    args.output = args.output or args.work
    if args.megatron is None and "megatron" in args.contenders:
        args.contenders.remove("megatron")
    return args


def runs_so_far(args: argparse.Namespace, settings: dict) -> dict[str, list[dict]]:
    """What has been measured into --output. Raises UserError: of something else."""
    path = args.output / "preprocess.json"
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    if results["settings"] != settings:
        raise UserError(f"{path}: measured with other settings: choose another --output")
    return results["runs"]


def write_corpus(sources: list[Path], corpus: Path, max_bytes: int) -> None:
    """JSON lines of max_bytes of text, of evenly drawn directories of the sources."""
    partial, size = corpus.with_suffix(".partial"), 0
    folders = [folder for source in sources for folder, _, _ in sorted(os.walk(source))]
    order = np.random.default_rng(0).permutation(len(folders))
    with partial.open("w") as file:
        for i in order:
            text = "\n".join(texts_of_folder(folders[i], _LARGEST_FILE))
            if text and size < max_bytes and SENTENCEPIECE_SPACE not in text:
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
    if size < max_bytes:
        raise UserError(f"--sources: {size:,} bytes of text, less than --max-bytes {max_bytes:,}")
    partial.rename(corpus)


def measure_corpus(corpus: Path) -> tuple[int, int]:
    """Bytes of text, and documents."""
    sizes = [len(json.loads(line)["text"].encode()) for line in corpus.open()]
    return sum(sizes), len(sizes)


def command_of(name: str, args: argparse.Namespace, corpus: Path) -> list[str]:
    """The command line of a contender."""
    tokenizer = ["--tokenizer-type", args.tokenizer_type]
    tokenizer += ["--tokenizer-model", args.tokenizer_model] if args.tokenizer_model else []
    workers = ["--workers", str(args.workers)]
    common = ["--output-prefix", str(args.work / name), "--append-eod", *tokenizer, *workers]
    if name == "megatron":
        tool = args.megatron / "tools" / "preprocess_data.py"
        return [sys.executable, str(tool), "--input", str(corpus), *common]
    tool = REPOSITORY / "tools" / "preprocess_data.py"
    backend = "fast" if name == "fast" else "usual"
    command = [sys.executable, str(tool), "--input", str(corpus), *common, "--overwrite"]
    return [*command, "--tokenizer-backend", backend]


def run(command: list[str], args: argparse.Namespace, name: str) -> dict[str, float]:
    """Seconds of a command, processor seconds and peak memory of its processes. Raises UserError if
    it fails."""
    path = os.pathsep.join([str(args.megatron)] if name == "megatron" else [])
    environment = {**os.environ, "PYTHONPATH": path or os.environ.get("PYTHONPATH", "")}
    with (args.work / f"{name}.log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = PeakMemory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        most = peak.stop()
    if process.returncode:
        raise UserError(f"{name} ended with status {process.returncode}: see {log.name}")
    processor_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": most}


class PeakMemory:
    """The most memory that a process and those that it started have had, looked at twice a
    second: of shared pages each has its share, so that they count once."""

    def __init__(self, pid: int) -> None:
        self._done, self._most = threading.Event(), 0
        self._process = psutil.Process(pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            total = 0
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            for process in family:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self._most = max(self._most, total)


def made_by(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the tokens of a contender."""
    prefix = prefix_of(name, args)
    return {"tokens": int(Pair.open(prefix, prefix).index.document_lengths().sum())}


def prefix_of(name: str, args: argparse.Namespace) -> str:
    """The files that a contender writes."""
    return f"{args.work / name}_text_document"


def line_of(name: str, rows: list[dict], text_bytes: int) -> str:
    """Return a line of the table: medians of the rounds."""
    seconds, tokens = median(rows, "seconds"), median(rows, "tokens")
    return (
        f"| {name} | {len(rows)} | {seconds:.1f} | {text_bytes / seconds / 1e6:.2f} |"
        f" {tokens / seconds:,.0f} | {median(rows, 'processor_seconds'):.1f} |"
        f" {max(row['peak_bytes'] for row in rows) / 2**20:,.0f} MiB |"
    )


def median(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


if __name__ == "__main__":
    run_command(main)
