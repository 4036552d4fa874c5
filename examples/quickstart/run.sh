#!/usr/bin/env bash
# From raw files to held-out perplexity on a CPU, in a few minutes: every command that a real run
# needs, at a size for two cores. `make quickstart` runs it inside the virtual environment;
# without make: examples/quickstart/run.sh [RUN_FOLDER [FLAGS OF pretrain_longnet.py]]
set -euo pipefail

run=${1:-runs/quickstart}
flags=("${@:2}")
here=$(cd "$(dirname "$0")/../.." && pwd)
data=$run/data
mkdir -p "$data"

# On the CPU even where there is a GPU: two ranks, one thread each.
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

say() { printf '\n== %s\n' "$*"; }
SECONDS=0

say "1/5  Collecting the Python standard library's source code, every file a document"
python "$here/examples/quickstart/collect_python_source.py" --output "$data/python.jsonl"

say "2/5  Training a SentencePiece tokenizer (BPE with byte fallback) on it"
python "$here/tools/train_tokenizer.py" --overwrite \
    --input "$data/python.jsonl" --output-prefix "$run/tokenizer" --vocab-size 2048

say "3/5  Turning the text into tokens: Megatron's .bin and .idx"
python "$here/tools/preprocess_data.py" --overwrite \
    --input "$data/python.jsonl" --output-prefix "$data/python" \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$run/tokenizer.model" \
    --append-eod --workers 2

# A second start of this script goes on where the first one was stopped, thanks to --load.
say "4/5  Pretraining a LongNet, four branches; its context of 2048 is spread over 2 ranks"
deepspeed --num_gpus 2 --master_port "${MASTER_PORT:-29500}" "$here/pretrain_longnet.py" \
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 2048 \
    --segment-lengths 512 1024 2048 2048 --dilation-rates 1 2 4 8 \
    --sequence-parallel-size 2 --precision fp32 --micro-batch-size 2 --global-batch-size 2 \
    --untie-embeddings-and-output-weights --init-method-std 0.06 \
    --train-iters 560 --lr 3e-3 --lr-warmup-iters 20 --adam-beta2 0.95 \
    --data-path "$data/python_text_document" --tokenizer-model "$run/tokenizer.model" \
    --split 88,2,10 --log-interval 20 --eval-interval 140 --eval-iters 8 --full-validation \
    --save "$run" --load "$run" --save-interval 140 "${flags[@]}"

say "5/5  Plots and report"
python "$here/tools/plot_run.py" "$run"
python "$here/examples/quickstart/report.py" "$run" --seconds "$SECONDS"
