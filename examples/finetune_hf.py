"""Fine-tune an exported model with Transformers' Trainer.

    python examples/finetune_hf.py --model runs/quickstart-hf --data answers.jsonl --output tuned

A line of the data is {"prompt": "...", "completion": "..."}; only the completion and the end of
text after it are learnt. The result is a folder like the one that it started from, which
tools/convert_from_hf.py takes too. It needs `pip install -e '.[hf]'`, and runs on several GPUs by
`torchrun --nproc_per_node 8`.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone need not be installed

from megalong.utils.command_line import ArgumentParser, run
from megalong.utils.errors import UserError, system_errors_of


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder that tools/convert_to_hf.py wrote")
    add("--data", type=Path, required=True, help="JSON lines with prompt and completion")
    add("--output", type=Path, required=True, help="folder to write")
    add("--overwrite", action="store_true", help="write over what is in --output")
    add("--epochs", type=float, default=3, help="times through the data")
    add("--max-steps", type=int, default=-1, help="end after so many steps (default: the epochs)")
    add("--batch-size", type=int, default=8, help="examples a step and device")
    add("--lr", type=float, default=2e-5, help="peak learning rate")
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        raise UserError(f"--model {args.model}: no config.json; tools/convert_to_hf.py writes one")
    with system_errors_of("--output", args.output):
        if args.output.exists() and any(args.output.iterdir()) and not args.overwrite:
            raise UserError(f"--output {args.output} is not empty: choose another, or --overwrite")
    return args


def main() -> None:
    args = parse_arguments()
    pairs = read_pairs(args.data)
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=True, dtype=torch.float32
    )
    options = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="group_by_length",  # little padding
        activation_checkpointing=True,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        bf16=torch.cuda.is_available(),  # on float32 weights
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        model=model,
        args=options,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100, not learnt
        train_dataset=[encode(tokenizer, *pair) for pair in pairs],
    )
    trainer.train()
    trainer.save_model()  # with the model's code and the tokenizer


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Prompts and completions. Raises UserError for a line without them."""
    pairs = []
    with system_errors_of("--data", path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
                pair = example["prompt"], example["completion"]
            except (ValueError, KeyError, TypeError):
                pair = (None,)
            if not all(isinstance(text, str) for text in pair):
                raise UserError(
                    f'--data {path}, line {number}: not {{"prompt": "...", "completion": "..."}}'
                )
            pairs.append(pair)
    if not pairs:
        raise UserError(f"--data {path}: the file is empty")
    return pairs


def encode(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """The tokens of an example, and which of them are learnt. One that is longer than a sequence of
    the training loses its beginning."""
    given = tokenizer(prompt)["input_ids"]
    wanted = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    tokens = (given + wanted)[-tokenizer.model_max_length :]
    labels = ([-100] * len(given) + wanted)[-len(tokens) :]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


if __name__ == "__main__":
    run(main)
