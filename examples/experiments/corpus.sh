#!/usr/bin/env bash
# The data of the experiments: long documents, a tokenizer, tokens, and how long the documents are.
#
#     examples/experiments/corpus.sh cpu|gpu FOLDER [FLAGS OF fetch_corpus.py]
#
# What is there already is not made again. FOLDER is what run.py takes as --corpus.
set -euo pipefail

usage="usage: corpus.sh cpu|gpu FOLDER [FLAGS OF fetch_corpus.py]"
scale=${1:?$usage}
folder=${2:?$usage}
flags=("${@:3}")
here=$(cd "$(dirname "$0")/../.." && pwd)

case $scale in
cpu) # models of some million parameters, sequences of up to 4,096 tokens
    vocabulary=1024
    sizes=(--max-bytes 24000000 --max-held-out-bytes 2000000 --held-out-share 0.1
        --min-bytes 16384 --max-document-bytes 65536 --held-out-document-bytes 16384
        --near-window 1024 --far-window 8192 --min-window-gain 1.5) ;;
gpu) # some hundred million parameters, sequences of up to 65,536 tokens
    vocabulary=32000
    sizes=(--max-bytes 1000000000 --max-held-out-bytes 20000000
        --min-bytes 131072 --max-document-bytes 1048576 --min-window-gain 1.3
        --max-seen-share 0.3) ;;
*)
    echo "$usage" >&2
    exit 2 ;;
esac

[ -e "$folder/corpus.json" ] ||
    python "$here/examples/experiments/fetch_corpus.py" --output "$folder" "${sizes[@]}" "${flags[@]}"
[ -e "$folder/tokenizer.model" ] ||
    python "$here/tools/train_tokenizer.py" --input "$folder/train.jsonl" \
        --output-prefix "$folder/tokenizer" --vocab-size "$vocabulary" --max-bytes 20000000
for part in train held_out; do
    [ -e "$folder/${part}_text_document.idx" ] ||
        python "$here/tools/preprocess_data.py" --input "$folder/$part.jsonl" --overwrite \
            --output-prefix "$folder/$part" --append-eod --workers "$(nproc)" \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$folder/tokenizer.model"
done
python "$here/tools/inspect_dataset.py" "$folder/train_text_document" \
    "$folder/held_out_text_document" --output "$folder/lengths" --overwrite |
    tee "$folder/lengths.txt"
