#!/usr/bin/env bash
# A dense model in Hugging Face's format becomes a LongNet of four times its length, on a CPU, from
# what `make quickstart` leaves behind; and what that is worth, beside the same model from scratch.
#
#     examples/recipes/imported_to_long/cpu.sh
#
# Stopped and started again it goes on. Results: runs/imported_to_long_results/*/evaluation.md
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../../.."

# On the CPU even where there is a GPU.
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=

train() { # RUN CONFIG [FLAGS]: all of a training, or the end of this script
    local run=$1 config=$2
    python pretrain_longnet.py --config "$config" --save "$run" --load "$run" "${@:3}"
    # One that is asked to stop saves and ends without an error, but what comes next needs all of it.
    if [ -e "$run/stopped" ]; then
        echo "$0: $(cat "$run/stopped"); the same command goes on" >&2
        exit 1
    fi
}

# A pretrained model: any other folder with a Llama, Qwen2 or Qwen3 model goes the same way. It has
# no tokenizer in it, as Transformers would read that of a Qwen2 as Qwen2's own.
if [ ! -e runs/pretrained-hf ]; then
    train runs/pretrained "$here/pretrained.yaml"
    python tools/convert_to_hf.py --load runs/pretrained --output runs/pretrained-hf \
        --model-type qwen2 --no-tokenizer
fi
[ -e runs/imported_cpu ] ||
    python tools/convert_from_hf.py --input runs/pretrained-hf --output runs/imported_cpu \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/quickstart/tokenizer.model

# Documents that no training sees: the last tenth, which --split keeps for tests.
documents=$(wc -l <runs/quickstart/data/python.jsonl)
tail -n $((documents / 10)) runs/quickstart/data/python.jsonl >runs/held_out.jsonl
evaluate() {
    python tools/evaluate.py --model "runs/$1" --input runs/held_out.jsonl \
        --context-lengths 1024 --output "runs/imported_to_long_results/$1" --overwrite
}

evaluate imported_cpu
train runs/imported_to_long_cpu "$here/cpu.yaml" --pretrained-checkpoint runs/imported_cpu
evaluate imported_to_long_cpu
# The same model and the same 122 steps without what the pretrained one knew, with a learning rate
# for that.
train runs/from_scratch_cpu "$here/cpu.yaml" --lr 3e-3
evaluate from_scratch_cpu
