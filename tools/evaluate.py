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
from functools import partial
from itertools import pairwise, product
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
    inputs = "files, folders or globs: plain text, a document a file, or JSON lines, one a line"
    add("--input", nargs="*", default=[], help=f"{inputs} (its text); .gz of either")
    add("--max-bytes", type=int, help="take only so much of the beginning of each file")
    counts = {"type": int, "nargs": "+"}
    add("--context-lengths", **counts, default=[2048], help="tokens of a window")
    behind = "tokens of --input that the same tokens behind them are predicted from"
    add("--prompt-lengths", type=int, nargs="*", default=[], help=behind)
    add("--suffix-tokens", type=int, default=256, help="tokens that are predicted behind them")
    add("--passkey-lengths", type=int, nargs="*", default=[], help="tokens of a passkey trial")
    depths, where = [0.0, 0.25, 0.5, 0.75, 1.0], "where the passkey is said, as a share of the text"
    add("--passkey-depths", type=float, nargs="+", default=depths, help=where)
    add("--passkey-trials", type=int, default=5, help="trials of each length and depth")
    add("--tasks", nargs="*", default=[], metavar="TASK", help=f"any of {', '.join(TASKS)}")
    add("--task-lengths", **counts, default=[2048], help="tokens of a sample")
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
    for name in (
        "context_lengths", "prompt_lengths", "suffix_tokens", "passkey_trials", "task_lengths",
        "task_samples",
    ):  # fmt: skip
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value], default=1) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
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

    say = partial(print, flush=True)

    def hint(text: str) -> None:
        print(f"hint: {text}", file=sys.stderr)

    results = {"model": str(args.model), "dtype": args.dtype, **{name: [] for name in TABLES}}
    if texts:
        size = sum(len(text.encode()) for text in texts)
        for context in args.context_lengths:
            edges = position_edges(context)
            with progress_bar(size, "B", f"context {context}") as bar:
                result = evaluate_texts(loaded, texts, context, edges, bar.update)
            results["texts"].append(result)
            say(
                f"context {context}: perplexity {result['perplexity']:.3f},"
                f" {result['bits_per_byte']:.4f} bits per byte, {result['tokens']} tokens"
            )
            if (longest := result["longest_window"]) < context:
                hint(
                    "no text of --input is that long: the longest has"
                    f" {counted(longest, 'token')}, and is read as a whole"
                )
        if result["tokens"] < FEW_TOKENS:
            hint(
                f"--input has only {result['tokens']:,} tokens to predict, too few to tell good"
                f" models apart: give it at least {FEW_TOKENS:,}"
            )
    if args.prompt_lengths:
        prompts = sorted(set(args.prompt_lengths))
        with progress_bar(None, "token", "prompts") as bar:
            found = losses_by_prompt(loaded, texts, prompts, args.suffix_tokens, bar.update)
        results["prompts"] = found
        for result in found:
            said = f"loss {result['loss']:.4f} of {result['tokens']} tokens"
            say(f"behind {result['prompt']} tokens: {said}")
    for length, depth in product(args.passkey_lengths, args.passkey_depths):
        tokens, name = args.passkey_trials * (length - 1), f"passkey at {depth:.0%} of {length}"
        with progress_bar(tokens, "token", name) as bar:
            result = passkey(loaded, length, depth, args.passkey_trials, on_tokens=bar.update)
        results["passkey"].append(result)
        say(f"{name}: found in {result['accuracy']:.0%}, loss {result['loss']:.3f}")
    for trials in trials_of_tasks:
        tokens = trials.samples * (trials.length - 1)
        with progress_bar(tokens, "token", f"{trials.task} of {trials.length}") as bar:
            score = task_score(loaded, trials, bar.update)
        results["tasks"].append({"style": args.task_style, **score.record()})
        say(
            f"{score.task} of {score.length}: {score.accuracy:.1%} of"
            f" {counted(score.answers, 'answer')} right, {score.token_accuracy:.1%} of their"
            f" tokens, loss {score.loss:.3f}"
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
    asked = product(dict.fromkeys(args.tasks), args.task_lengths)
    found = [Trials(task, language, length, args.task_samples) for task, length in asked]
    for trials in found:
        trials.check("--tasks", "--task-lengths")
        loaded.check_length(trials.length - 1)
    return found


# The columns of the table of each measurement, and what stands in them.
TABLES = {
    "texts": {
        "context": "{context:,}", "tokens": "{tokens:,}", "loss": "{loss:.4f}",
        "perplexity": "{perplexity:.3f}", "bits per byte": "{bits_per_byte:.4f}",
    },
    "prompts": {
        "prompt": "{prompt:,}", "suffix": "{suffix:,}", "tokens": "{tokens:,}",
        "loss": "{loss:.4f}", "perplexity": "{perplexity:.3f}",
    },
    "passkey": {
        "passkey in tokens": "{length:,}", "depth": "{depth:.0%}", "found": "{accuracy:.0%}",
        "loss": "{loss:.3f}",
    },
    "tasks": {
        "task": "{task}", "made of": "{style}", "tokens": "{length:,}", "answers": "{answers:,}",
        "right": "{accuracy:.1%}", "their tokens": "{token_accuracy:.1%}", "loss": "{loss:.3f}",
    },
}  # fmt: skip


def tables(results: dict) -> str:
    """Return the numbers as tables of Markdown."""
    parts = [f"# Evaluation of {results['model']}, {results['dtype']}"]
    for name, columns in TABLES.items():
        if found := results[name]:
            rows = [" | ".join(columns.values()).format(**result) for result in found]
            parts.append(_table(list(columns), rows))
        if name == "texts" and found:
            parts.append(_position_table(found))
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
    from megalong.evals.scores import plot_buckets

    for result in results:
        edges, losses = result["position_edges"], result["loss_by_position"]
        label = f"context {result['context']:,}: {result['bits_per_byte']:.3f} bits per byte"
        plot_buckets(axis, edges, losses, label)
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
