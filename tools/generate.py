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

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from megalong.hf.configs import DTYPES
from megalong.hf.loaded_model import LoadedModel, load_model
from megalong.log_filters import filter_library_logs


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="float32")
    add("--tokenizer-model", help="where the tokenizer of a megalong checkpoint is now")
    args = parser.parse_args()
    if args.max_new_tokens < 1 or args.prefill_chunk_size < 1:
        parser.error("--max-new-tokens and --prefill-chunk-size must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        parser.error("--temperature must not be negative, and --top-p must lie in (0, 1]")
    return args


def main() -> int:
    filter_library_logs()
    args = parse_arguments()
    try:
        prompt = args.prompt
        if prompt is None:
            prompt = args.prompt_file.read_text(encoding="utf-8")
        loaded = load_model(args.model, args.device, DTYPES[args.dtype], args.tokenizer_model)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    continue_text(loaded, prompt, args)
    return 0


def continue_text(loaded: LoadedModel, prompt: str, args: argparse.Namespace) -> None:
    """Print the prompt and what the model makes of it, as the beginning of a document."""
    torch.manual_seed(args.seed)
    own = loaded.model.generation_config
    # What else a folder asks for, a repetition penalty for instance, would not be what was asked.
    loaded.model.generation_config = GenerationConfig(
        eos_token_id=own.eos_token_id,
        pad_token_id=loaded.first,
        do_sample=args.temperature > 0,
        temperature=args.temperature or None,
        top_p=args.top_p if args.temperature else None,
        top_k=0 if args.temperature else None,
    )
    tokens = torch.tensor([[loaded.first, *loaded.encode(prompt)]], device=args.device)
    loaded.model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=args.max_new_tokens,
        prefill_chunk_size=args.prefill_chunk_size,
        streamer=Printer(loaded),
    )


class Printer(BaseStreamer):
    """Prints the text of the tokens that it is given, as soon as it is certain: a character may be
    made of several tokens."""

    def __init__(self, loaded: LoadedModel):
        self.decode = loaded.decode
        # Text is decoded from a little before what is new: from `start` on, with `known` tokens of
        # it printed already, since a token's text may depend on the one before it.
        self.tokens, self.start, self.known = None, 0, 0

    def put(self, value: torch.Tensor) -> None:
        """value: token ids; the first call has the prompt's, after the token before the text."""
        ids = value.flatten().tolist()
        if self.tokens is None:
            self.tokens = ids[1:]
        else:
            self.tokens += ids
        new = self._new_text()
        if new and not new.endswith("\N{REPLACEMENT CHARACTER}"):
            print(new, end="", flush=True)
            self.start, self.known = self.known, len(self.tokens)

    def end(self) -> None:
        print(self._new_text(), flush=True)

    def _new_text(self) -> str:
        before = self.decode(self.tokens[self.start : self.known])
        return self.decode(self.tokens[self.start :])[len(before) :]


if __name__ == "__main__":
    sys.exit(main())
