"""What is in tokenized data, and whether it is sound.

    python tools/inspect_dataset.py data/stdlib_text_document
    python tools/inspect_dataset.py data/stdlib_text_document --seq-length 32768 --decode 0
    python tools/inspect_dataset.py data/ --verify

Each is a prefix, or a folder or pattern of many, as for training. Says counts, lengths of
documents, and what made them. With --seq-length also what training would make of them: sequences in
an epoch, and how much of their own document tokens have before them, with either --sample-mode and
with --length-upsampling. --decode shows documents, or with --seq-length samples of the training, as
text, with what a loss mask makes context only in white square brackets. --output writes a plot of
the lengths. The index is checked in any case; --verify reads all tokens, and loss masks, too.
Exit status: 0, or 2 where the data is damaged (one line says what is wrong, in which file).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.data.tokenizers.tokenizer import TOKENIZERS
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, counted

MODES = ("stream", "document")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add(
        "prefix",
        nargs="+",
        help="what tools/preprocess_data.py wrote: PREFIX_KEY_document, or a folder of such",
    )
    add("--seq-length", type=int, help="tokens in a sequence: what training would make of the data")
    add("--sample-mode", choices=MODES, help="with --seq-length: of the training (default: both)")
    add(
        "--length-upsampling",
        nargs="+",
        metavar="TOKENS:WEIGHT",
        help="with --seq-length: of the training",
    )
    add("--split", default="969,30,1", help="with --seq-length: of the training")
    add("--seed", type=int, default=1234, help="with --decode and --seq-length: of the training")
    add("--tokenizer-type", choices=list(TOKENIZERS), help="kind of tokenizer (default: as made)")
    add("--tokenizer-model", help="file, or folder, of the tokenizer")
    add("--decode", type=int, nargs="+", metavar="I", help="show these documents, or samples")
    add("--decode-tokens", type=int, default=400, help="so many of each document are shown")
    add("--output", type=Path, help="folder for a plot of the lengths")
    add("--overwrite", action="store_true", help="replace an earlier plot in --output")
    add("--json", action="store_true", help="the same as one JSON list, an object per prefix")
    add("--verify", action="store_true", help="read all tokens, and see that ids are in order")
    args = parser.parse_args()
    if args.seq_length is None and (args.sample_mode or args.length_upsampling):
        flag = "--sample-mode" if args.sample_mode else "--length-upsampling"
        raise UserError(f"{flag} is about sequences: set --seq-length")
    if args.decode_tokens < 1:
        raise UserError(f"--decode-tokens {args.decode_tokens}: must be positive")
    return args


def main() -> None:
    args = parse_arguments()
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    from megalong.data.inspection import Dataset, TrainingFlags
    from megalong.data.sources import LengthUpsampling
    from megalong.utils.progress import progress_bar

    plots = []
    if args.output is not None:
        plots = _plot_files(args.prefix, args.output, args.overwrite)
    flags = None
    if args.seq_length is not None:
        upsampling = args.length_upsampling and LengthUpsampling.parse(args.length_upsampling)
        flags = TrainingFlags(args.seq_length, args.split, args.seed, upsampling or None)
    found = []
    for i, prefix in enumerate(args.prefix):
        data = Dataset(prefix)
        content = data.describe()
        if flags is not None:
            modes = MODES if args.sample_mode is None else (args.sample_mode,)
            content["training"] = data.describe_training(flags, modes)
        tokenizer, named = None, bool(args.tokenizer_type or args.tokenizer_model)
        if args.decode is not None or (args.verify and named):
            tokenizer = data.tokenizer(args.tokenizer_type, args.tokenizer_model)
        if args.verify:
            ids = (tokenizer.vocab_size, tokenizer.eod) if named else (None, None)
            with progress_bar(data.bytes_to_verify, "B", f"reading {prefix}") as progress:
                content["verified"] = data.verify(*ids, progress)
        if args.decode is not None:
            mode = args.sample_mode or "stream"
            content["decoded"] = [
                data.decoded(number, tokenizer, args.decode_tokens, flags, mode)
                for number in args.decode
            ]
        if plots:
            plot(content, plots[i])
            content["plot"] = str(plots[i])
        found.append(content)
        if not args.json:
            print("\n".join(in_words(content)), flush=True)
    if args.json:
        print(json.dumps(found, indent=2))


def in_words(content: dict[str, Any]) -> Iterator[str]:
    """The lines of what was found."""
    from megalong.utils.progress import human_bytes

    pairs = f"{content['pairs']:,} pairs, " if content["pairs"] > 1 else ""
    yield (
        f"{content['prefix']}: {pairs}{counted(content['documents'], 'document')},"
        f" {counted(content['tokens'], 'token')}, {content['dtype']},"
        f" {human_bytes(content['bytes'])}"
    )
    if content["loss_mask"] is not None:
        tokens = content["loss_mask"]["tokens"]
        masks = counted(content["loss_mask"]["pairs"], "loss mask")
        yield (
            f"{counted(tokens, 'token')} ({tokens / content['tokens']:.1%}) count in the loss, by"
            f" {masks}; the others are context"
        )
    yield from _provenance_words(content["sidecar"] or {})
    yield from _length_words(content)
    yield from (f"note: {remark}" for remark in content["remarks"])
    yield from _training_words(content.get("training"))
    if "verified" in content:
        yield from _verified_words(content["verified"], content)
    for item in content.get("decoded", ()):
        what = "document" if "document" in item else "sample"
        yield f"=== {what} {item[what]}, {counted(item['tokens'], 'token')}"
        for part in item["parts"]:
            if what == "sample":
                yield f"--- document from token {part['token']:,} on"
            yield part["text"]
    if "plot" in content:
        yield f"{content['plot']}: documents and tokens by length"


def _provenance_words(made: dict[str, Any]) -> Iterator[str]:
    """What the sidecar says of where the data is from."""
    if "tokenizer_type" in made:
        model = f" {made['tokenizer_model']}" if made.get("tokenizer_model") else ""
        ends = "ends" if made.get("append_eod") else "does not end"
        begins = ", begins with its beginning-of-text token" if made.get("prepend_bos") else ""
        yield (
            f"made with {made['tokenizer_type']}{model} of {made.get('vocab_size', 0):,} ids; a"
            f" document {ends} with its end-of-document token{begins}"
        )
    inputs = [file.get("path") for file in made.get("inputs", ())]
    if inputs:
        count = counted(made.get("inputs_in_all", len(inputs)), "file")
        yield f"of {count}: {', '.join(inputs[:3])}{', ...' if len(inputs) > 3 else ''}"
    left_out = [f"{number:,} {what}" for what, number in made.get("left_out", {}).items() if number]
    if left_out:
        yield f"left out were documents: {', '.join(left_out)}"
    repeats = made.get("repeats") or {}
    if repeats.get("documents") and not made.get("deduplicate"):
        yield (
            f"texts that repeat another one: {counted(repeats['documents'], 'document')} of"
            f" {counted(repeats['tokens'], 'token')}; preprocess_data.py --deduplicate leaves them"
            " out"
        )


def _length_words(content: dict[str, Any]) -> Iterator[str]:
    lengths = content["lengths"]
    quantiles = ", ".join(f"{float(q):.0%} {value:,}" for q, value in lengths["quantiles"].items())
    yield (
        f"lengths from {lengths['shortest']:,} to {lengths['longest']:,}, {lengths['mean']:,.1f} on"
        f" average; so many documents are at most so long: {quantiles}"
    )
    yield f"{'length in tokens':>25}  {'documents':>20}  {'of the tokens':>13}"
    for row in content["histogram"]:
        share = row["tokens"] / content["tokens"]
        yield (
            f"{row['from']:>11,} - {row['to']:>11,}  {row['documents']:>12,}"
            f" {row['documents'] / content['documents']:>7.1%}  {share:>13.1%}"
            f"  {'#' * round(40 * share)}"
        ).rstrip()
    shares = content["share_of_tokens_in_documents_of_at_least"]
    yield "share of the tokens in documents of at least " + ", ".join(
        f"{bound} {share:.1%}" for bound, share in shares.items()
    )


def _training_words(training: dict[str, Any] | None) -> Iterator[str]:
    if training is None:
        return
    yield (
        f"--seq-length {training['seq_length']} on the {counted(training['documents'], 'document')}"
        f" for training (--split {training['split']}):"
        f" {counted(training['tokens_per_epoch'], 'token')} an epoch"
    )
    for row in training.get("length_upsampling", ()):
        yield (
            f"  {row['documents']} x {row['weight']:g}: {row['before']:.1%} of the tokens ->"
            f" {row['after']:.1%}"
        )
    for mode, found in training["modes"].items():
        yield (
            f"  --sample-mode {mode}: {counted(found['samples_per_epoch'], 'sequence')} an epoch;"
            f" {found['in_words']}"
        )


def _verified_words(verified: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    yield (
        f"sound: all tokens read, ids from {verified['smallest_id']} to {verified['largest_id']};"
        f" Megatron-core {verified['megatron_core']} reads it"
    )
    if verified["documents_ending_with_eod"] is not None:
        with_text = content["documents"] - content["empty_documents"]
        yield (
            f"{verified['documents_ending_with_eod']:,} of {counted(with_text, 'document')} end"
            " with the end-of-document token"
        )
    if verified["loss_masks"]:
        yield f"{counted(verified['loss_masks'], 'loss mask')} read, and sound"


def _plot_files(prefixes: list[str], folder: Path, overwrite: bool) -> list[Path]:
    """A file for each prefix. Raises UserError where one is there already."""
    from megalong.utils.files import writable_folder

    files = [
        folder / f"{re.sub(r'[*?[]+', '_', Path(prefix).name)}_lengths.png" for prefix in prefixes
    ]
    if len(set(files)) < len(files):
        raise UserError(f"--output {folder}: two prefixes have one name: give them one by one")
    for file in files:
        if file.exists() and not overwrite:
            raise UserError(f"{file} is there already: choose another --output, or --overwrite")
    writable_folder("--output", folder)
    return files


def plot(content: dict[str, Any], path: Path) -> None:
    """Shares of the documents and of the tokens by length, beside one another."""
    from matplotlib.figure import Figure

    rows = content["histogram"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for shift, key, color in ((-0.2, "documents", "#4878a8"), (0.2, "tokens", "#c85a3c")):
        shares = [row[key] / content[key] for row in rows]
        places = [i + shift for i in range(len(rows))]
        axes.bar(places, shares, 0.4, color=color, label=f"{content[key]:,} {key}")
    axes.set_xticks(range(len(rows)), [f"{row['from']:,}" for row in rows], rotation=45, ha="right")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set(
        xlabel="tokens in a document, at least", ylabel="share", title=Path(content["prefix"]).name
    )
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run(main)
