"""fp16 with its loss scaler, on the CPU: DeepSpeed offers it there only to processors with fp16
arithmetic, so the worker tells it that this one has it (PyTorch computes it either way)."""

import sys

from tests.forked import run_ranks
from tests.launching import small_run_flags

WORKER = __file__


def test_fp16_skips_overflows_lowers_the_scale_and_learns(corpus, tmp_path):
    """2^22 overflows at first: the steps are skipped until the scale fits. A resumed run goes on
    with the scale of the one before."""
    import json

    shorter = {"seq_length": 64, "segment_lengths": "16 32 64", "global_batch_size": 4}
    flags = small_run_flags(
        corpus, precision="fp16", initial_loss_scale=2**22, save_interval=4, **shorter
    )
    flags += ["--save", str(tmp_path), "--load", str(tmp_path)]
    run_ranks(2, WORKER, *flags, "--train-iters", 8, "--lr-decay-iters", 30)
    state = json.loads((tmp_path / "iter_0000008" / "progress.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    skipped = [r["grad_norm"] is None for r in records if "split" not in r]
    assert skipped[0] and not all(skipped)
    assert state["updates"] == skipped.count(False)
    assert state["loss_scaler"]["cur_scale"] < 2**22

    run_ranks(2, WORKER, *flags, "--train-iters", 30, "--lr-decay-iters", 30)
    whole = tmp_path / "whole"
    flags[flags.index("--save") + 1] = flags[flags.index("--load") + 1] = str(whole)
    run_ranks(2, WORKER, *flags, "--train-iters", 30, "--lr-decay-iters", 30)
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").open()]
        for folder in (tmp_path, whole)
    ]
    assert losses[0][-5:] == losses[1][-5:]
    assert losses[0][-3] < losses[0][0] - 0.5


if __name__ == "__main__":
    from deepspeed.accelerator import get_accelerator

    import pretrain_longnet

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    supported = accelerator.supported_dtypes()
    accelerator.supported_dtypes = lambda: supported
    pretrain_longnet.main(sys.argv[1:])
