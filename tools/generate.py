"""Continue texts with a model, and print them as they come.

    python tools/generate.py --model longnet-hf --prompt "def main(" --prompt "class A"
    python tools/generate.py --model runs/longnet --prompt-file book.txt --max-new-tokens 500
    python tools/generate.py --model runs/longnet --interactive --stop $'\\n\\n'

--model is a run folder or a checkpoint of megalong, or a folder of Transformers, such as
tools/convert_to_hf.py writes, or a Llama's; no code out of a folder is run. Dilated attention keeps
only the rows of the past that a later token can still attend to, so that a long prompt costs little
memory. A text ends where the model ends the document, at a --stop, or after --max-new-tokens: a
model whose data had no end-of-document tokens (preprocess_data.py --append-eod) never ends one.

--interactive reads a line after the other from standard input, until an empty one or Ctrl-D; each
goes on where the text before it has ended, with what was stopped at between them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.hf.configs import DTYPES
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, system_errors_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from megalong.hf.loaded_model import Continuation


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint, run folder or Transformers folder")
    add("--prompt", action="append", default=[], help="a text to continue; may be given repeatedly")
    add("--prompt-file", type=Path, action="append", default=[], help="a file with one; likewise")
    add("--interactive", action="store_true", help="read texts to go on with from standard input")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end when the model writes this, and leave it out; may be given repeatedly",
    )
    add("--max-new-tokens", type=int, default=200, help="the longest continuation")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token always")
    add("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this share")
    add("--seed", type=int, default=0, help="of the draws, anew for each prompt")
    add("--prefill-chunk-size", type=int, default=8192, help="tokens of the prompt read at once")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add("--tokenizer-model", help="the model's tokenizer (default: the checkpoint's own)")
    args = parser.parse_args()
    if not (args.prompt or args.prompt_file or args.interactive):
        raise UserError("nothing to continue: give --prompt, --prompt-file or --interactive")
    if args.max_new_tokens < 1 or args.prefill_chunk_size < 1:
        raise UserError("--max-new-tokens and --prefill-chunk-size must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must not be negative, and --top-p must lie in (0, 1]")
    if "" in args.stop:
        raise UserError("--stop is an empty text, at which every text ends: leave it out")
    return args


def main() -> int | None:
    args = parse_arguments()
    prompts = args.prompt + [_read(file) for file in args.prompt_file]
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    import torch

    from megalong.hf.loaded_model import continue_text, load_model

    go_on = partial(
        continue_text,
        load_model(args.model, args.device, getattr(torch, args.dtype), args.tokenizer_model),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        prefill_chunk_size=args.prefill_chunk_size,
        stop=args.stop,
    )
    try:
        text = ""
        for number, prompt in enumerate(prompts, start=1):
            if len(prompts) > 1:
                print(f"--- {number} of {len(prompts)}", flush=True)
            text = prompt + _say_length(go_on(prompt), args.max_new_tokens).text
        if args.interactive:
            converse(go_on, text, args)
    except KeyboardInterrupt:
        print()
        return 130
    return None


def converse(go_on: Callable[..., Continuation], text: str, args: argparse.Namespace) -> None:
    """Read a line, continue all that was said so far with it, and so on. text: said before."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line:
            return
        text += line + "\n"
        text += _say_length(go_on(text, echo=False), args.max_new_tokens).text
        text += args.stop[0] if args.stop else "\n"


def _read(file: Path) -> str:
    try:
        with system_errors_of("--prompt-file", file):
            return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt-file {file}: not UTF-8 (byte {error.start})") from None


def _say_length(continuation: Continuation, max_new_tokens: int) -> Continuation:
    if not continuation.ended:
        print(f"(cut off after --max-new-tokens {max_new_tokens})", file=sys.stderr, flush=True)
    return continuation


if __name__ == "__main__":
    run(main)
