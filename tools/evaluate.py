"""How good is a model at each context length? Perplexity, bits per byte, loss by position, loss of
the same tokens behind longer and longer prompts, passkey retrieval, and other tasks that ask for
what was said long before.

    python tools/evaluate.py --model runs/longnet --input book.txt --context-lengths 2048 8192 \\
        --tasks niah_multikey mqar --task-lengths 2048 8192 --output evaluation

--model is a run folder or a checkpoint of megalong, or a folder of Transformers, such as
tools/convert_to_hf.py writes, or a Llama's. Writes evaluation.json, evaluation.md (tables) and
evaluation.png into --output. The samples of a task are those of --eval-tasks in the training. Every
token of the input is predicted once at each context length, so that the numbers of different
lengths, tokenizers (bits per byte) and models can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.data.formats import raw_documents
from megalong.data.formats import texts as texts_of
from megalong.data.text.documents import BrokenDocument, Reading
from megalong.data.text.files import find_files
from megalong.evals import STYLES, TASKS
from megalong.hf.configs import DTYPES
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, counted, did_you_mean
from megalong.utils.files import writable_folder

if TYPE_CHECKING:
    from megalong.evals.trials import Trials
    from megalong.hf.loaded_model import LoadedModel


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """words: of the command line, instead of this process's own."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint, run folder or Transformers folder")
    add(
        "--input",
        nargs="*",
        default=[],
        help="files, folders or globs: plain text, a document a file, or JSON lines, one a line"
        " (its text); .gz of either",
    )
    add("--max-bytes", type=int, help="take only so much of the beginning of each file")
    add("--context-lengths", type=int, nargs="+", default=[2048], help="tokens of a window")
    add(
        "--prompt-lengths",
        type=int,
        nargs="*",
        default=[],
        help="tokens of --input that the same tokens behind them are predicted from",
    )
    add("--suffix-tokens", type=int, default=256, help="tokens that are predicted behind them")
    add("--passkey-lengths", type=int, nargs="*", default=[], help="tokens of a passkey trial")
    add(
        "--passkey-depths",
        type=float,
        nargs="+",
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        help="where the passkey is said, as a share of the text",
    )
    add("--passkey-trials", type=int, default=5, help="trials of each length and depth")
    add("--tasks", nargs="*", default=[], metavar="TASK", help=f"any of {', '.join(TASKS)}")
    add("--task-lengths", type=int, nargs="+", default=[2048], help="tokens of a sample")
    add("--task-style", choices=STYLES, default="text", help="made of text, or of bare token ids")
    add("--task-samples", type=int, default=32, help="samples of each task and length")
    add("--output", type=Path, required=True, help="folder for evaluation.json, .md and .png")
    add("--overwrite", action="store_true", help="replace an earlier evaluation in --output")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add("--tokenizer-model", help="the model's tokenizer (default: the checkpoint's own)")
    args = parser.parse_args(words)
    if not args.input and not args.passkey_lengths and not args.tasks:
        raise UserError("nothing to do: give --input, --passkey-lengths or --tasks")
    if args.prompt_lengths and not args.input:
        raise UserError("--prompt-lengths are of the texts of --input: give it too")
    at_least_one = {
        "--context-lengths": args.context_lengths,
        "--prompt-lengths": args.prompt_lengths or [1],
        "--suffix-tokens": [args.suffix_tokens],
        "--passkey-trials": [args.passkey_trials],
        "--task-lengths": args.task_lengths,
        "--task-samples": [args.task_samples],
    }
    for name, values in at_least_one.items():
        if min(values) < 1:
            raise UserError(f"{name} must be at least 1")
    for task in args.tasks:
        if task not in TASKS:
            raise UserError(f"--tasks {task}: no such task{did_you_mean(task, TASKS)}")
    if not all(0 <= depth <= 1 for depth in args.passkey_depths):
        raise UserError("--passkey-depths must lie between 0 and 1")
    if (args.output / "evaluation.json").exists() and not args.overwrite:
        raise UserError(
            f"{args.output / 'evaluation.json'} is there already: choose another --output, or"
            " --overwrite"
        )
    return args


def main() -> None:
    args = parse_arguments()
    texts = [text for file in find_files(args.input) for text in _read(file, args.max_bytes)]
    if args.input and not any(texts):
        raise UserError("--input: the files are empty")
    writable_folder("--output", args.output)
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    import torch

    from megalong.hf.loaded_model import load_model

    loaded = load_model(args.model, args.device, getattr(torch, args.dtype), args.tokenizer_model)
    results = evaluate(loaded, texts, args)
    (args.output / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output / "evaluation.md").write_text(tables(results))
    plot(results, args.output / "evaluation.png")
    print(f"{args.output}: evaluation.json, evaluation.md and evaluation.png")


def _read(file: str, max_bytes: int | None) -> Iterator[str]:
    """The documents of a file, as far as its first max_bytes of text. Raises UserError for a broken
    one: without it the numbers would be others."""
    reading = Reading()
    left = sys.maxsize if max_bytes is None else max_bytes
    try:
        for document in raw_documents(file, reading, lambda line: print(line, file=sys.stderr)):
            text = texts_of(document, reading).get("text", "")
            if isinstance(text, BrokenDocument):
                raise text
            content = text.encode()[:left]
            left -= len(content)
            if content:
                yield content.decode(errors="ignore")
            if not left:
                return
    except BrokenDocument as broken:
        raise UserError(f"--input {broken}") from None


def evaluate(loaded: LoadedModel, texts: list[str], args: argparse.Namespace) -> dict:
    """Every measurement that the flags ask for, printed as it is made."""
    trials_of_tasks = _trials(loaded, args)  # what cannot be made is refused before it takes time
    from megalong.evals.scores import FEW_TOKENS, position_edges
    from megalong.hf.evaluation import evaluate_texts, losses_by_prompt, passkey, task_score
    from megalong.utils.progress import progress_bar

    results = {"model": str(args.model), "dtype": args.dtype}
    results |= {"texts": [], "prompts": [], "passkey": [], "tasks": []}
    if texts:
        size = sum(len(text.encode()) for text in texts)
        for context in args.context_lengths:
            edges = position_edges(context)
            with progress_bar(size, "B", f"context {context}") as bar:
                result = evaluate_texts(loaded, texts, context, edges, bar.update)
            results["texts"].append(result)
            print(
                f"context {context}: perplexity {result['perplexity']:.3f},"
                f" {result['bits_per_byte']:.4f} bits per byte, {result['tokens']} tokens",
                flush=True,
            )
            if result["longest_window"] < context:
                print(
                    "hint: no text of --input is that long: the longest has"
                    f" {counted(result['longest_window'], 'token')}, and is read as a whole",
                    file=sys.stderr,
                )
        if result["tokens"] < FEW_TOKENS:
            print(
                f"hint: --input has only {result['tokens']:,} tokens to predict, too few to tell"
                f" good models apart: give it at least {FEW_TOKENS:,}",
                file=sys.stderr,
            )
    if args.prompt_lengths:
        prompts = sorted(set(args.prompt_lengths))
        with progress_bar(None, "token", "prompts") as bar:
            found = losses_by_prompt(loaded, texts, prompts, args.suffix_tokens, bar.update)
        results["prompts"] = found
        for result in found:
            print(
                f"behind {result['prompt']} tokens: loss {result['loss']:.4f} of"
                f" {result['tokens']} tokens",
                flush=True,
            )
    for length in args.passkey_lengths:
        for depth in args.passkey_depths:
            trials = args.passkey_trials
            with progress_bar(
                trials * (length - 1), "token", f"passkey at {depth:.0%} of {length}"
            ) as bar:
                result = passkey(loaded, length, depth, trials, on_tokens=bar.update)
            results["passkey"].append(result)
            print(
                f"passkey at {depth:.0%} of {length}: found in {result['accuracy']:.0%},"
                f" loss {result['loss']:.3f}",
                flush=True,
            )
    for trials in trials_of_tasks:
        tokens = trials.samples * (trials.length - 1)
        with progress_bar(tokens, "token", f"{trials.task} of {trials.length}") as bar:
            score = task_score(loaded, trials, bar.update)
        results["tasks"].append({"style": args.task_style, **score.record()})
        print(
            f"{score.task} of {score.length}: {score.accuracy:.1%} of"
            f" {counted(score.answers, 'answer')} right, {score.token_accuracy:.1%} of their"
            f" tokens, loss {score.loss:.3f}",
            flush=True,
        )
    return results


def _trials(loaded: LoadedModel, args: argparse.Namespace) -> list[Trials]:
    from megalong.evals.trials import Trials, language_of

    if not args.tasks:
        return []
    try:
        language = language_of(args.task_style, loaded.encode, loaded.ids, loaded.first)
    except UserError as error:
        raise UserError(f"--task-style {args.task_style}: {error}") from None
    found = [
        Trials(task, language, length, args.task_samples)
        for task in dict.fromkeys(args.tasks)
        for length in args.task_lengths
    ]
    for trials in found:
        trials.check("--tasks", "--task-lengths")
        loaded.check_length(trials.length - 1)
    return found


def tables(results: dict) -> str:
    """The numbers as tables of Markdown."""
    parts = [f"# Evaluation of {results['model']}, {results['dtype']}"]
    if results["texts"]:
        parts.append(
            _table(
                ["context", "tokens", "loss", "perplexity", "bits per byte"],
                [
                    f"{r['context']:,} | {r['tokens']:,} | {r['loss']:.4f} | {r['perplexity']:.3f}"
                    f" | {r['bits_per_byte']:.4f}"
                    for r in results["texts"]
                ],
            )
        )
        parts.append(_position_table(results["texts"]))
    if results["prompts"]:
        parts.append(
            _table(
                ["prompt", "suffix", "tokens", "loss", "perplexity"],
                [
                    f"{r['prompt']:,} | {r['suffix']:,} | {r['tokens']:,} | {r['loss']:.4f} |"
                    f" {r['perplexity']:.3f}"
                    for r in results["prompts"]
                ],
            )
        )
    if results["passkey"]:
        parts.append(
            _table(
                ["passkey in tokens", "depth", "found", "loss"],
                [
                    f"{r['length']:,} | {r['depth']:.0%} | {r['accuracy']:.0%} | {r['loss']:.3f}"
                    for r in results["passkey"]
                ],
            )
        )
    if results["tasks"]:
        parts.append(
            _table(
                ["task", "made of", "tokens", "answers", "right", "their tokens", "loss"],
                [
                    f"{r['task']} | {r['style']} | {r['length']:,} | {r['answers']:,} |"
                    f" {r['accuracy']:.1%} | {r['token_accuracy']:.1%} | {r['loss']:.3f}"
                    for r in results["tasks"]
                ],
            )
        )
    return "\n\n".join(parts) + "\n"


def _position_table(results: list[dict]) -> str:
    """The loss by position in the window, a column for each context length."""
    columns = [
        dict(zip(pairwise(r["position_edges"]), r["loss_by_position"], strict=True))
        for r in results
    ]
    rows = []
    for begin, end in sorted({bucket for column in columns for bucket in column}):
        losses = [column.get((begin, end)) for column in columns]
        shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
        if any(shown):
            rows.append(" | ".join([f"{begin:,} to {end - 1:,}", *shown]))
    return _table(["position", *(f"loss at {r['context']:,}" for r in results)], rows)


def _table(columns: list[str], rows: list[str]) -> str:
    lines = [" | ".join(columns), "|".join(["---"] * len(columns)), *rows]
    return "\n".join(f"| {line} |" for line in lines)


def plot(results: dict, path: Path) -> None:
    """The loss by position at each context length and behind prompts, the passkeys found, and the
    tasks by distance, side by side."""
    from matplotlib.figure import Figure

    from megalong.evals.scores import plot_by_distance

    draw = {
        "texts": _plot_positions,
        "prompts": _plot_prompts,
        "passkey": _plot_passkeys,
        "tasks": plot_by_distance,
    }
    panels = [name for name in draw if results[name]]
    figure = Figure(figsize=(7 * len(panels), 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for name, axis in zip(panels, axes[0], strict=True):
        draw[name](axis, results[name])
    figure.savefig(path, dpi=120)


def _plot_positions(axis, results: list[dict]) -> None:
    for result in results:
        edges, losses = result["position_edges"], result["loss_by_position"]
        centres = [(a + b) / 2 for a, b in pairwise(edges)]
        points = [(x, y) for x, y in zip(centres, losses, strict=True) if y is not None]
        label = f"context {result['context']:,}: {result['bits_per_byte']:.3f} bits per byte"
        axis.plot(*zip(*points, strict=True), "o-", markersize=3, label=label)
    axis.set(xscale="log", xlabel="position in the window", ylabel="loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()


def _plot_prompts(axis, results: list[dict]) -> None:
    axis.plot([r["prompt"] for r in results], [r["loss"] for r in results], "o-")
    suffix = results[0]["suffix"]
    axis.set(
        xscale="log", xlabel="tokens of the prompt", ylabel=f"loss of the same {suffix} behind"
    )
    axis.grid(alpha=0.3)


def _plot_passkeys(axis, results: list[dict]) -> None:
    lengths, depths = (sorted({r[name] for r in results}) for name in ("length", "depth"))
    found = {(r["depth"], r["length"]): r for r in results}
    table = [[found[depth, length]["accuracy"] for length in lengths] for depth in depths]
    image = axis.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for (depth, length), result in found.items():
        text = f"{result['accuracy']:.0%}\nloss {result['loss']:.2f}"
        color = "white" if result["accuracy"] > 0.6 else "black"
        place = lengths.index(length), depths.index(depth)
        axis.text(*place, text, ha="center", va="center", color=color)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="tokens", ylabel="depth", title="passkeys found")
    axis.figure.colorbar(image)


if __name__ == "__main__":
    run(main)
