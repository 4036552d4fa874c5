"""Start real processes: a script on several ranks, or a training run."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PRETRAIN = str(REPOSITORY / "pretrain_longnet.py")


def ranks_command(ranks: int, script: str, *arguments: object) -> list[str]:
    """The command that runs a script on this many ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={ranks}"]
    return [*launcher, script, *map(str, arguments)]


def run(command: list[str], timeout: float = 300, check: bool = True):
    """Run a command to its end; on failure the assertion shows what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def small_run_flags(corpus: Path, **changes: object) -> list[str]:
    """Flags of a training run that takes a second: two layers, 128 tokens, three branches."""
    flags = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": 128,
        "segment_lengths": "32 64 128",
        "dilation_rates": "1 2 3",
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 6,
        "lr": 3e-3,
        "lr_warmup_iters": 2,
        "precision": "fp32",
        "data_path": corpus,
        "tokenizer_type": "ByteTokenizer",
        "split": "80,15,5",
        "eval_iters": 1,
    } | changes
    words = []
    for name, value in flags.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else str(value).split()
    return words
