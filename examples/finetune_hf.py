"""Fine-tune an exported model with Transformers' Trainer.

    python examples/finetune_hf.py --model runs/quickstart-hf --data answers.jsonl --output tuned

A line of the data is {"prompt": "...", "completion": "..."}; only the completion and the end of
text after it are learnt. The result is a folder like the one that it started from, which
tools/convert_from_hf.py takes too. It needs `pip install accelerate`, and runs on several GPUs by
`torchrun --nproc_per_node 8`.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder that tools/convert_to_hf.py wrote")
    add("--data", type=Path, required=True, help="JSON lines with prompt and completion")
    add("--output", type=Path, required=True, help="folder to write")
    add("--epochs", type=float, default=3, help="times through the data (default: 3)")
    add("--max-steps", type=int, default=-1, help="end after so many steps (default: the epochs)")
    add("--batch-size", type=int, default=8, help="examples a step and device (default: 8)")
    add("--lr", type=float, default=2e-5, help="peak learning rate (default: 2e-5)")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, trust_remote_code=True, dtype=torch.float32
    )
    with args.data.open(encoding="utf-8") as file:
        examples = [encode(tokenizer, **json.loads(line)) for line in file]
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
        train_dataset=examples,
    )
    trainer.train()
    trainer.save_model()  # with the model's code and the tokenizer


def encode(tokenizer, prompt: str, completion: str) -> dict[str, list[int]]:
    """The tokens of an example, and which of them are learnt. One that is longer than a sequence of
    the training loses its beginning."""
    given = tokenizer(prompt)["input_ids"]
    wanted = tokenizer(completion + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    tokens = (given + wanted)[-tokenizer.model_max_length :]
    labels = ([-100] * len(given) + wanted)[-len(tokens) :]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


if __name__ == "__main__":
    main()
