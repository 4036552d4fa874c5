"""The user's DeepSpeed file is merged; where it contradicts a flag both values are named."""

import json

import pytest

from megalong.config.arguments import parse_arguments
from megalong.errors import UserError
from megalong.training.deepspeed_config import deepspeed_config

FLAGS = ["--data-path", "d", "--tokenizer-type", "ByteTokenizer", "--micro-batch-size", "2"]
FLAGS += ["--global-batch-size", "16", "--lr", "1e-3", "--zero-stage", "2"]


def merged(tmp_path, settings, ranks=2):
    file = tmp_path / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    flags = [*FLAGS, "--deepspeed-config", str(file)]
    return deepspeed_config(parse_arguments(flags).resolve(ranks), ranks)


def test_what_no_flag_owns_is_passed_on(tmp_path):
    result = merged(
        tmp_path,
        {
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
            "wall_clock_breakdown": True,
            "train_batch_size": 16,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": "auto",
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.98]}},
        },
    )
    assert result["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert result["wall_clock_breakdown"] is True
    assert result["gradient_clipping"] == 1.0
    # DeepSpeed sees one micro batch: the schedule is Megatron-core's.
    assert result["gradient_accumulation_steps"] == 1
    assert "optimizer" not in result and "train_batch_size" not in result


@pytest.mark.parametrize(
    "settings, names",
    [
        (
            {"zero_optimization": {"stage": 3}},
            ["zero_optimization.stage", "3", "--zero-stage", "2"],
        ),
        ({"train_batch_size": 32}, ["train_batch_size", "32", "--global-batch-size", "16"]),
        ({"gradient_accumulation_steps": 2}, ["gradient_accumulation_steps", "2", "4"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "0.5", "--clip-grad", "1.0"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled", "false", "--precision bf16", "true"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "true", "--precision bf16 makes it false"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.params.lr", "0.1", "--lr", "0.001"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "--lr-decay-style"]),
        ({"activation_checkpointing": {}}, ["activation_checkpointing", "--recompute-granularity"]),
        ({"optimizer": "AdamW"}, ["optimizer must be an object"]),
        ({"optimizer": {"type": None}}, ["None", "AdamW"]),
        ({"zero_optimization": 3}, ["zero_optimization must be an object"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "bf16", "fp32"]),
        ({"bf16": {"check_grad_overflow": False}}, ["bf16.check_grad_overflow", "false", "true"]),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            ["zero_optimization.compute_grad_norm", "false", "true"],
        ),
        ("{broken", ["not JSON"]),
        ("[]", ["expected a JSON object"]),
    ],
)
def test_contradictions_name_both_values(tmp_path, settings, names):
    with pytest.raises(UserError) as error:
        merged(tmp_path, settings)
    for name in [*names, "--deepspeed-config"]:
        assert name in str(error.value)


def test_the_optimizer_of_the_flags_is_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FLAGS", [*FLAGS, "--optimizer", "sgd"])
    same = {"type": "sgd", "params": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}}
    assert "optimizer" not in merged(tmp_path, {"optimizer": same})
    for other, names in (
        ({"type": "AdamW"}, ["AdamW", "--optimizer sgd"]),
        ({"params": {"momentum": 0.5}}, ["optimizer.params.momentum", "0.5", "--sgd-momentum"]),
    ):
        with pytest.raises(UserError) as error:
            merged(tmp_path, {"optimizer": other})
        assert all(name in str(error.value) for name in names)


def test_a_missing_file_is_named():
    flags = [*FLAGS, "--deepspeed-config", "no.json"]
    with pytest.raises(UserError, match=r"--deepspeed-config no.json: No such file"):
        deepspeed_config(parse_arguments(flags).resolve(1), 1)
