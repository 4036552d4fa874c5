"""Turn a folder of Hugging Face Transformers into a checkpoint that training goes on from.

    python tools/convert_from_hf.py --input longnet-hf --output runs/imported
    python tools/convert_from_hf.py --input llama --output runs/llama --seq-length 32768 \\
        --segment-lengths 2048 8192 32768 --dilation-rates 1 4 16

then, with the command that this prints, `pretrain_longnet.py --config runs/imported/flags.yaml
--load runs/imported --save OTHER --data-path ...`. Accepted are the folders that
tools/convert_to_hf.py writes, and Llama, Mistral, Qwen2 and Qwen3 models with RoPE as it is or
scaled (linear, llama3 or yarn). Anything else is refused with the reason. Without a pattern, a
model of the Llama family keeps its attention, dense or with a sliding window (--attention dilated
takes the default ladder).
Further flags are those of pretrain_longnet.py, for instance --tokenizer-type and --head-offsets
(default: what the model's folder says, its tokenizer too).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError


def main() -> None:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, help="folder with config.json and safetensors")
    add("--output", type=Path, required=True, help="run folder to write; must not hold anything")
    args, others = parser.parse_known_args()
    from megalong.config.arguments import build_parser, read_yaml
    from megalong.utils.command_line import filter_library_logs

    filter_library_logs()
    from megalong.hf.importing import import_model, read_config
    from megalong.utils.files import writable_folder

    writable_folder("--output", args.output.parent)
    changes = vars(build_parser().parse_args(others))
    if "preset" in changes:
        raise UserError(f"--preset {changes['preset']}: the model is that of --input; leave it out")
    if "config" in changes:
        changes = read_yaml(changes.pop("config")) | changes
    if "segment_lengths" in changes and read_config(args.input).get("model_type") != "longnet":
        changes.setdefault("attention", "dilated")
    checkpoint, config = import_model(args.input, args.output, changes)
    seq_length = config.model.seq_length
    print(f"{checkpoint}: {seq_length} tokens; {config.attention.description}")
    tokenizer = f"--tokenizer-type {config.data.tokenizer_type}"
    if config.data.tokenizer_model is not None:
        tokenizer += f" --tokenizer-model {config.data.tokenizer_model}"
    if config.data.prepend_bos:
        tokenizer += " --prepend-bos"
    print(f"make its data with: tools/preprocess_data.py {tokenizer} --append-eod ...")
    print(
        f"go on with: pretrain_longnet.py --config {args.output}/flags.yaml --load {args.output}"
        " --save OTHER --data-path PREFIX --lr 1e-5 --lr-warmup-iters 100, or what suits the model"
    )


if __name__ == "__main__":
    run(main)
