"""Turn a checkpoint into a folder that Hugging Face Transformers reads.

    python tools/convert_to_hf.py --load runs/longnet --output longnet-hf

then `AutoModelForCausalLM.from_pretrained("longnet-hf", trust_remote_code=True)`. One process, no
GPU, one tensor in memory at a time, from a checkpoint of any parallel layout. The folder holds
sharded safetensors, the configuration, the model's code, the tokenizer, and a model card that says
where the model comes from. It is written aside and renamed. With `--model-type llama`, qwen2 or
qwen3 a dense model becomes one of Transformers' own, which needs no code and no trust.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.hf.configs import DTYPES, MODEL_TYPES
from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import counted


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--load", type=Path, required=True, help="run folder, or one of its iter_* folders")
    add("--output", type=Path, required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace an earlier export in --output")
    add("--dtype", choices=DTYPES, help="of the weights (default: the precision of the training)")
    add(
        "--model-type",
        choices=MODEL_TYPES,
        default="longnet",
        help="write a dense model as one of Transformers' own types, which need no code of ours"
        " (default: longnet)",
    )
    add("--max-shard-size", default="5GB", help="of one weight file")
    add(
        "--tokenizer-model", help="another tokenizer file or folder (default: the checkpoint's own)"
    )
    add(
        "--no-tokenizer", action="store_true", help="write no tokenizer files (default: write them)"
    )
    hashes = "do not compare its files with their hashes first (default: compare them)"
    add("--no-verify-checkpoint", action="store_true", help=hashes)
    args = parser.parse_args()
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    from megalong.hf.exporting import export
    from megalong.utils.files import writable_folder

    writable_folder("--output", args.output.parent)
    result = export(
        args.load,
        args.output,
        args.dtype,
        args.max_shard_size,
        args.tokenizer_model,
        not args.no_tokenizer,
        not args.no_verify_checkpoint,
        args.overwrite,
        args.model_type,
    )
    print(
        f"{args.output}: iteration {result['iteration']:,}, {result['parameters']} in"
        f" {counted(result['files'], 'file')}"
    )


if __name__ == "__main__":
    run(main)
