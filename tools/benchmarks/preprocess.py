"""Speed and memory of tools/preprocess_data.py beside what else tokenizes the same text.

    python tools/benchmarks/preprocess.py --sources /usr/src/linux --work /tmp/preprocess \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --workers 2 \\
        --megatron ~/Megatron-LM --output runs/preprocess

makes documents of folders of source code in --work (a directory's own files are one document, so
that they are long), and then has these tokenize them, taking turns, --rounds times:

    ours       tools/preprocess_data.py --tokenizer-backend usual
    fast       tools/preprocess_data.py --tokenizer-backend fast
    library    the tokenizer's own encoding of a batch, by as many threads, of text in memory
    megatron   Megatron-LM's tools/preprocess_data.py, of a clone that --megatron names

Of each: seconds of the whole command (of the library: of encoding alone), megabytes and tokens a
second, and the peak memory of all its processes, shared pages counted once. Checked: all write the
same tokens. With --times N ours reads the text N times over, for the memory of a larger input.
Writes preprocess.json and preprocess.md into --output.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a clone need not be installed

from megalong.command_line import REPOSITORY, ArgumentParser, needed_packages
from megalong.command_line import run as run_command
from megalong.data.text.documents import BrokenDocument, RawDocument
from megalong.data.text.source_file import NAME, read
from megalong.data.tokenizers.tokenizer import TOKENIZERS, build_tokenizer
from megalong.errors import UserError

with needed_packages():
    import numpy as np
    import psutil

    from megalong.data.preprocessing.writer import DTYPES, HEADER

CONTENDERS = ("ours", "fast", "library", "megatron")
_SLICE_BYTES = 1 << 24  # of text that the library encodes at a time: its results take memory
_LARGEST_FILE = 1 << 20


def main() -> None:
    args = parse_arguments()
    if args.as_library:
        encode_with_library(args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    corpus = args.work / f"corpus_{args.max_bytes}.jsonl"
    if not corpus.exists():
        write_corpus(args.sources, corpus, args.max_bytes)
    text_bytes, documents = measure_corpus(corpus)
    print(f"{corpus}: {documents:,} documents, {text_bytes:,} bytes of text", flush=True)
    runs: dict[str, list[dict]] = {name: [] for name in args.contenders}
    for round_number in range(args.rounds):
        # Each starts as often first as it does last.
        order = args.contenders if round_number % 2 == 0 else args.contenders[::-1]
        for name in order:
            seconds, peak = run(command_of(name, args, corpus), args, name)
            tokens = tokens_of(name, args)
            if name == "library":
                seconds = json.loads((args.work / "library.json").read_text())["seconds"]
            runs[name].append({"seconds": seconds, "peak_bytes": peak, "tokens": tokens})
            rate = text_bytes * (args.times if name in ("ours", "fast") else 1) / seconds / 1e6
            print(
                f"{name:9} {seconds:8.1f} s {rate:7.2f} MB/s {tokens / seconds / 1e3:9.1f}"
                f" Ktokens/s, peak {peak / 2**20:,.0f} MiB",
                flush=True,
            )
    check_same(args)
    write_results(args, runs, text_bytes, documents)


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
    add("--times", type=int, default=1, help="how often ours reads the corpus, in one run")
    add("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    add("--megatron", type=Path, help="a clone of Megatron-LM")
    add("--as-library", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output = args.output or args.work
    if args.megatron is None and "megatron" in args.contenders:
        args.contenders.remove("megatron")
    return args


def write_corpus(sources: list[Path], corpus: Path, max_bytes: int) -> None:
    """JSON lines of max_bytes of text, of evenly drawn directories of the sources."""
    partial, size = corpus.with_suffix(".partial"), 0
    folders = [folder for source in sources for folder, _, _ in sorted(os.walk(source))]
    order = np.random.default_rng(0).permutation(len(folders))
    with partial.open("w") as file:
        for i in order:
            text = "\n".join(texts_in(Path(folders[i])))
            if text and size < max_bytes:
                size += len(text.encode())
                file.write(json.dumps({"text": text}) + "\n")
    if size < max_bytes:
        raise UserError(f"--sources: {size:,} bytes of text, less than --max-bytes {max_bytes:,}")
    partial.rename(corpus)


def texts_in(folder: Path) -> Iterator[str]:
    """The texts of the files that lie in a folder itself."""
    for path in sorted(folder.iterdir()):
        document = RawDocument(NAME, str(path), None, None, None, 0)
        if path.is_file() and not path.is_symlink():
            try:
                yield read(document, str(path), _LARGEST_FILE)
            except BrokenDocument:
                continue


def measure_corpus(corpus: Path) -> tuple[int, int]:
    """Bytes of text, and documents."""
    sizes = [len(json.loads(line)["text"].encode()) for line in corpus.open()]
    return sum(sizes), len(sizes)


def command_of(name: str, args: argparse.Namespace, corpus: Path) -> list[str]:
    """The command line of a contender."""
    tokenizer = ["--tokenizer-type", args.tokenizer_type]
    tokenizer += ["--tokenizer-model", args.tokenizer_model] if args.tokenizer_model else []
    workers = ["--workers", str(args.workers)]
    if name == "library":
        command = [sys.executable, __file__, "--work", str(args.work), *tokenizer, *workers]
        return [*command, "--as-library", str(corpus)]
    common = ["--output-prefix", str(args.work / name), "--append-eod", *tokenizer, *workers]
    if name == "megatron":
        tool = args.megatron / "tools" / "preprocess_data.py"
        return [sys.executable, str(tool), "--input", str(corpus), *common]
    inputs = [str(corpus)]
    for i in range(1, args.times):  # a file is read once, whatever its names
        link = args.work / f"again_{i}.jsonl"
        link.unlink(missing_ok=True)
        link.symlink_to(corpus)
        inputs.append(str(link))
    tool = REPOSITORY / "tools" / "preprocess_data.py"
    backend = "fast" if name == "fast" else "usual"
    command = [sys.executable, str(tool), "--input", *inputs, *common, "--overwrite"]
    return [*command, "--tokenizer-backend", backend]


def run(command: list[str], args: argparse.Namespace, name: str) -> tuple[float, int]:
    """Seconds of a command, and the peak memory of its processes. Raises UserError if it fails."""
    path = os.pathsep.join([str(args.megatron)] if name == "megatron" else [])
    environment = {**os.environ, "PYTHONPATH": path or os.environ.get("PYTHONPATH", "")}
    with (args.work / f"{name}.log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peak = PeakMemory(process.pid)
        status = process.wait()
        seconds = time.perf_counter() - start
        most = peak.stop()
    if status:
        raise UserError(f"{name} ended with status {status}: see {log.name}")
    return seconds, most


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


def encode_with_library(args: argparse.Namespace) -> None:
    """Encode the corpus by the tokenizer's own function for batches; writes library.json."""
    texts = [json.loads(line)["text"] for line in args.as_library.open()]
    encode = library_batch(args)
    seconds, tokens, batch, size = 0.0, len(texts), [], 0  # an end of each document
    for i, text in enumerate(texts):
        batch.append(text)
        size += len(text)
        if size >= _SLICE_BYTES or i == len(texts) - 1:
            start = time.perf_counter()
            count = encode(batch)
            seconds += time.perf_counter() - start
            tokens, batch, size = tokens + count, [], 0
    result = {"seconds": seconds, "tokens": tokens}
    (args.work / "library.json").write_text(json.dumps(result))


def library_batch(args: argparse.Namespace):
    """A function that encodes texts by args.workers threads and counts the tokens."""
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    if args.tokenizer_type == "SentencePieceTokenizer":
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=args.tokenizer_model)
        return lambda texts: sum(map(len, model.encode(texts, num_threads=args.workers)))
    if args.tokenizer_type == "HuggingFaceTokenizer":
        backend = tokenizer.library  # with its own settings, as it is loaded
        return lambda texts: sum(
            len(encoding.ids)
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        )
    if args.tokenizer_type == "TikTokenizer":
        encoding = tokenizer.library
        return lambda texts: sum(
            map(len, encoding.encode_ordinary_batch(texts, num_threads=args.workers))
        )
    raise UserError(f"--tokenizer-type {args.tokenizer_type} has no function for batches")


def tokens_of(name: str, args: argparse.Namespace) -> int:
    if name == "library":
        return json.loads((args.work / "library.json").read_text())["tokens"]
    prefix = f"{args.work / name}_text_document"
    with open(f"{prefix}.idx", "rb") as file:
        code = HEADER.unpack(file.read(HEADER.size))[2]
    return os.path.getsize(f"{prefix}.bin") // DTYPES[code].itemsize


def check_same(args: argparse.Namespace) -> None:
    """Raises UserError where two contenders wrote other tokens."""
    written = [name for name in args.contenders if name != "library"]
    if args.times > 1:
        written = [name for name in written if name != "megatron"]
    for name in written[1:]:
        for suffix in (".bin", ".idx"):
            files = [f"{args.work / n}_text_document{suffix}" for n in (written[0], name)]
            if not filecmp.cmp(*files, shallow=False):
                raise UserError(f"{files[0]} and {files[1]} differ")
    print(f"identical files: {', '.join(written)}")


def write_results(
    args: argparse.Namespace, runs: dict[str, list[dict]], text_bytes: int, documents: int
) -> None:
    lines = [
        f"{documents:,} documents, {text_bytes / 1e6:,.1f} MB of text, {args.tokenizer_type},"
        f" {args.workers} workers; medians of {args.rounds} rounds.",
        "",
        "| | seconds | MB/s | tokens/s | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, of_name in runs.items():
        seconds = statistics.median(run["seconds"] for run in of_name)
        peak = max(run["peak_bytes"] for run in of_name)
        times = args.times if name in ("ours", "fast") else 1
        lines.append(
            f"| {name} | {seconds:.1f} | {text_bytes * times / seconds / 1e6:.2f} |"
            f" {of_name[0]['tokens'] / seconds:,.0f} | {peak / 2**20:,.0f} MiB |"
        )
    (args.output / "preprocess.md").write_text("\n".join(lines) + "\n")
    settings = {name: str(value) for name, value in vars(args).items() if name != "as_library"}
    results = {"settings": settings, "text_bytes": text_bytes, "documents": documents, "runs": runs}
    (args.output / "preprocess.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
