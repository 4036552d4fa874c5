"""Speed and memory of tools/preprocess_data.py beside what else tokenizes the same text.

    python tools/benchmarks/preprocess.py --sources /usr/src/linux --work /tmp/preprocess \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 2 \\
        --megatron ~/Megatron-LM --output runs/preprocess

makes documents of folders of source code in --work (a directory's own files are one document, so
that they are long), and then has these tokenize them, taking turns, --rounds times:

    ours       tools/preprocess_data.py --tokenizer-backend usual
    fast       tools/preprocess_data.py --tokenizer-backend fast
    library    the tokenizer's own encoding of a batch, by as many threads, of text in memory
    gigatoken  what `fast` tokenizes with, alone, in as many processes, of text in memory
    megatron   Megatron-LM's tools/preprocess_data.py, of a clone that --megatron names

Of each: seconds of the whole command (of `library` and `gigatoken`: of encoding alone), megabytes
and tokens a second, processor seconds of all its processes (which tell most on a machine with
other work), and their peak memory, shared pages counted once. Checked: all make as many tokens,
and those who write them the same ones. Documents with U+2581 are left out, which SentencePiece's
library takes for a space. Writes preprocess.json, preprocess.md and preprocess.png into --output;
what was measured there with the same settings is not measured again, so that the contenders may
come one by one.
"""

from __future__ import annotations

import argparse
import filecmp
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.data.text.source_file import texts_of_folder
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

CONTENDERS = ("ours", "fast", "library", "gigatoken", "megatron")
_IN_MEMORY = ("library", "gigatoken")  # what they read and write is not part of the time
_SLICE_BYTES = 1 << 24  # of text that the library encodes at a time: its results take memory
_LARGEST_FILE = 1 << 20


def main() -> None:
    args = parse_arguments()
    if args.as_contender:
        encode_in_memory(args)
        return
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
    first, *others = [prefix_of(x, args) for x in args.contenders if x not in _IN_MEMORY] or [""]
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
    add("--as-contender", choices=_IN_MEMORY, help=argparse.SUPPRESS)
    add("--corpus", type=Path, help=argparse.SUPPRESS)
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
    if name in _IN_MEMORY:
        command = [sys.executable, __file__, "--work", str(args.work), *tokenizer, *workers]
        return [*command, "--as-contender", name, "--corpus", str(corpus)]
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
    if name == "gigatoken":  # as the workers of `fast` have it
        environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
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


def encode_in_memory(args: argparse.Namespace) -> None:
    """Encode the corpus by a library alone; writes the seconds, and the tokens of each document
    with its end, to NAME.json."""
    encode = encode_with_library if args.as_contender == "library" else encode_with_gigatoken
    seconds, processor_seconds, lengths = encode(args)
    result = {"seconds": seconds, "processor_seconds": processor_seconds, "lengths": lengths}
    (args.work / f"{args.as_contender}.json").write_text(json.dumps(result))


def encode_with_library(args: argparse.Namespace) -> tuple[float, float, list[int]]:
    """Seconds and processor seconds of the tokenizer's own function for batches, and lengths."""
    texts = [json.loads(line)["text"] for line in args.corpus.open()]
    encode = library_batch(args)
    seconds, processor_seconds = 0.0, 0.0
    lengths, batch, size = [], [], 0
    for i, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= _SLICE_BYTES or i == len(texts) - 1:
            start, begin = time.perf_counter(), time.process_time()
            found = encode(batch)
            seconds += time.perf_counter() - start
            processor_seconds += time.process_time() - begin
            lengths += [length + 1 for length in found]
            batch, size = [], 0
    return seconds, processor_seconds, lengths


def encode_with_gigatoken(args: argparse.Namespace) -> tuple[float, float, list[int]]:
    """Seconds until the last of args.workers processes is done with its share, their processor
    seconds, and lengths."""
    encoder = build_tokenizer(args.tokenizer_type, args.tokenizer_model).fast_encoder()
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(args.workers + 1), context.Queue()
    processes = [
        context.Process(target=encode_share, args=(args, i, encoder, ready, results))
        for i in range(args.workers)
    ]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    shares = [results.get() for _ in processes]
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    lengths = dict(pair for _, share in shares for pair in share)
    return seconds, sum(share[0] for share in shares), [lengths[i] for i in range(len(lengths))]


def encode_share(args: argparse.Namespace, number: int, encoder, ready, results) -> None:
    """Every args.workers-th document, from `number` on."""
    lines = itertools.islice(args.corpus.open(), number, None, args.workers)
    texts = [json.loads(line)["text"] for line in lines]
    encoder(texts[0][:100])  # a copy loads the library at the first text
    ready.wait()
    start = time.process_time()
    lengths = [len(encoder(text)) + 1 for text in texts]
    seconds = time.process_time() - start
    results.put((seconds, list(zip(itertools.count(number, args.workers), lengths))))


def library_batch(args: argparse.Namespace):
    """A function that encodes texts by args.workers threads and counts the tokens of each."""
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    if args.tokenizer_type == "SentencePieceTokenizer":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer_model)
        return lambda texts: list(map(len, model.encode(texts, num_threads=args.workers)))
    if args.tokenizer_type == "HuggingFaceTokenizer":
        backend = tokenizer.library  # with its own settings, as it is loaded
        return lambda texts: [
            len(encoding.ids)
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
    if args.tokenizer_type == "TikTokenizer":
        encoding = tokenizer.library
        return lambda texts: list(
            map(len, encoding.encode_ordinary_batch(texts, num_threads=args.workers))
        )
    raise UserError(f"--tokenizer-type {args.tokenizer_type} has no function for batches")


def made_by(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the tokens of a contender; of one in memory what it has measured itself too."""
    if name in _IN_MEMORY:
        measured = json.loads((args.work / f"{name}.json").read_text())
        return measured | {"tokens": sum(measured.pop("lengths"))}
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
