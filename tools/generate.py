"""Continue a text with a model, and print it as it comes.

    python tools/generate.py --model longnet-hf --prompt "def main("
    python tools/generate.py --model runs/longnet --prompt-file book.txt --max-new-tokens 500

--model is a run folder or a checkpoint of megalong, or a folder of Transformers, such as
tools/convert_to_hf.py writes, or a Llama's; no code out of a folder is run. Dilated attention keeps
only the rows of the past that a later token can still attend to, so that a long prompt costs little
memory.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.command_line import ArgumentParser, run
from megalong.errors import UserError
from megalong.hf.configs import DTYPES


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="checkpoint, run folder or Transformers folder")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, help="a file with it")
    add("--max-new-tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token always")
    add("--top-p", type=float, default=0.95, help="draw from the likeliest tokens of this share")
    add("--seed", type=int, default=0)
    add("--prefill-chunk-size", type=int, default=8192, help="tokens of the prompt read at once")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", choices=DTYPES, default="float32")
    add("--tokenizer-model", help="where the tokenizer of a megalong checkpoint is now")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.prefill_chunk_size < 1:
        raise UserError("--max-new-tokens and --prefill-chunk-size must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise UserError("--temperature must not be negative, and --top-p must lie in (0, 1]")
    return args


def main() -> None:
    args = parse_arguments()
    prompt = args.prompt
    if prompt is None:
        prompt = args.prompt_file.read_text(encoding="utf-8")
    from megalong.log_filters import filter_library_logs

    filter_library_logs()
    import torch

    from megalong.hf.generation import continue_text
    from megalong.hf.loaded_model import load_model

    continue_text(
        load_model(args.model, args.device, getattr(torch, args.dtype), args.tokenizer_model),
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        prefill_chunk_size=args.prefill_chunk_size,
    )


if __name__ == "__main__":
    run(main)
