#!/usr/bin/env bash
# A dense model in Hugging Face's format becomes a LongNet of four times its length, on a CPU, from
# what `make quickstart` leaves behind; and what that is worth, beside the same model from scratch.
#
#     examples/recipes/imported_to_long/cpu.sh
#
# Stopped and started again it goes on. Results: runs/imported_to_long_results/*/evaluation.md
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
train() { python "$root/pretrain_longnet.py" --config "$@"; }

# A pretrained model: any other folder with a Llama, Qwen2 or Qwen3 model goes the same way. It has
# no tokenizer in it, as Transformers would read that of a Qwen2 as Qwen2's own.
if [ ! -e runs/pretrained-hf ]; then
    train "$here/pretrained.yaml"
    python "$root/tools/convert_to_hf.py" --load runs/pretrained --output runs/pretrained-hf \
        --model-type qwen2 --no-tokenizer
fi
[ -e runs/imported ] ||
    python "$root/tools/convert_from_hf.py" --input runs/pretrained-hf --output runs/imported \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/quickstart/tokenizer.model

# Documents that no training sees: of the last tenth, which --split keeps for tests.
tail -n 50 runs/quickstart/data/python.jsonl >runs/held_out.jsonl
evaluate() {
    python "$root/tools/evaluate.py" --model "runs/$1" --input runs/held_out.jsonl \
        --context-lengths 1024 --output "runs/imported_to_long_results/$1" --overwrite
}

evaluate imported
train "$here/cpu.yaml" --pretrained-checkpoint runs/imported
evaluate imported_to_long
# The same model and the same 122 steps without what the pretrained one knew, with a learning rate
# for that.
train "$here/cpu.yaml" --save runs/from_scratch --load runs/from_scratch --lr 3e-3
evaluate from_scratch
