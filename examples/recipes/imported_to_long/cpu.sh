#!/usr/bin/env bash
# A dense model in Hugging Face's format becomes a LongNet of four times its length, on a CPU, from
# what `make quickstart` leaves behind; and what that is worth, beside the same model from scratch.
#
#     examples/recipes/imported_to_long/cpu.sh
#
# What is done already is not done again. Results: runs/imported_to_long_results/*/evaluation.md
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
train() { python "$root/pretrain_longnet.py" --config "$@"; }

# A pretrained model: any other folder with a Llama, Qwen2 or Qwen3 model goes the same way.
train "$here/pretrained.yaml"
[ -e runs/pretrained-hf ] ||
    python "$root/tools/convert_to_hf.py" --load runs/pretrained --output runs/pretrained-hf \
        --model-type qwen2

[ -e runs/imported ] ||
    python "$root/tools/convert_from_hf.py" --input runs/pretrained-hf --output runs/imported
train "$here/cpu.yaml" --pretrained-checkpoint runs/imported

# The same model, and the same 122 steps, without what the pretrained one knew.
train "$here/cpu.yaml" --save runs/from_scratch --load runs/from_scratch --lr 3e-3

# Documents that none of these has seen: of the last tenth, which --split keeps for tests.
tail -n 50 runs/quickstart/data/python.jsonl >runs/held_out.jsonl
results=runs/imported_to_long_results
for model in pretrained-hf imported_to_long from_scratch; do
    [ -e "$results/$model/evaluation.md" ] ||
        python "$root/tools/evaluate.py" --model "runs/$model" --input runs/held_out.jsonl \
            --context-lengths 1024 --prompt-lengths 256 768 --output "$results/$model"
done
