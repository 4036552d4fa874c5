"""The user's DeepSpeed file is merged; where it contradicts a flag both values are named."""

import json

import pytest

from megalong.config.arguments import parse_arguments
from megalong.training.deepspeed_config import deepspeed_config
from megalong.utils.errors import UserError

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


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_buckets_are_no_larger_than_what_is_trained(stage, precision, tmp_path):
    flags = [*FLAGS[:-1], str(stage), "--precision", precision]

    def bucket(parameters, *more):
        config = parse_arguments([*flags, *more]).resolve(2)
        return deepspeed_config(config, 2, parameters)["zero_optimization"]["reduce_bucket_size"]

    most = 50_000_000 if (stage, precision) == (1, "bf16") else 500_000_000
    assert bucket(None) == most
    assert [bucket(count) for count in (1234, most, most + 1)] == [1234, most, most]
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 4321}}')
    assert bucket(1234, "--deepspeed-config", str(file)) == 4321


@pytest.mark.parametrize(
    "settings, names",
    [
        (
            {"zero_optimization": {"stage": 3}},
            ["zero_optimization.stage", "3", "--zero-stage", "2"],
        ),
        ({"train_batch_size": 32}, ["train_batch_size", "32", "--global-batch-size", "16"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping", "0.5", "--clip-grad", "1.0"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "true", "--precision bf16 makes it false"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"optimizer": {"params": {"lr": 0.1}}}, ["optimizer.params.lr", "0.1", "--lr", "0.001"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "--lr-decay-style"]),
        ({"activation_checkpointing": {}}, ["activation_checkpointing", "--recompute-granularity"]),
        ({"optimizer": "AdamW"}, ["optimizer must be an object"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "bf16", "fp32"]),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            ["zero_optimization.round_robin_gradients", "true", "false"],
        ),
        (
            {"zero_optimisation": {"overlap_comm": False}},
            ["knows no zero_optimisation; did you mean zero_optimization?"],
        ),
        (
            {"zero_optimization": {"reduce_bucketsize": 5}},
            ["no zero_optimization.reduce_bucketsize; did you mean reduce_bucket_size?"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            ["no zero_optimization.offload_optimizer.devise; did you mean device?"],
        ),
        ({"timers": {"troughput": {}}}, ["no timers.troughput; did you mean throughput?"]),
        ({"bfloat16": {"enabled": True}}, ["knows no bfloat16"]),  # beside ours it is not read
        ({"wobble": 1}, ["knows no wobble"]),
        ({"optimizer": {"params": {"learning_rate": 1}}}, ["optimizer.params.learning_rate"]),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            ["zero_optimization.reduce_bucket_size is 'large': ", "valid integer"],
        ),
        ({"communication_data_type": "fp8"}, ["DeepSpeed refuses", "communication_data_type"]),
        ({"elasticity": {}}, ["Elastic training has been removed"]),
        ("{broken", ["not JSON"]),
        ("[]", ["expected a JSON object"]),
    ],
)
def test_contradictions_name_both_values(tmp_path, settings, names):
    with pytest.raises(UserError) as error:
        merged(tmp_path, settings)
    for name in [*names, "--deepspeed-config"]:
        assert name in str(error.value)


def test_what_deepspeed_knows_is_let_through(tmp_path):
    """Also what it takes whole and reads later, or somewhere else than in its configuration."""
    known = {
        "steps_per_print": 5,
        "comms_logger": {"enabled": False},
        "tensorboard": {"enabled": False, "output_path": "x"},
        "flops_profiler": {"enabled": False, "detailed": True},
        "aio": {"block_size": 2**20, "queue_depth": 4},
        "checkpoint": {"tag_validation": "Warn", "parallel_write": {"pipeline_stage": False}},
        "compile": {"deepcompile": False},
        "data_efficiency": {
            "enabled": False,
            "data_sampling": {"num_epochs": 3, "later": 1},
            "data_routing": {"random_ltd": {"enabled": False, "total_layer_num": 24}},
        },
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
        "vocabulary_size": 256,
        "sequence_parallel_size": 1,
        "zero_optimization": {"stage3_max_live_parameters": 10**8, "overlap_comm": "auto"},
    }
    assert merged(tmp_path, known).items() >= {"steps_per_print": 5, "vocabulary_size": 256}.items()


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


def test_muon_of_the_flags_is_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.FLAGS", [*FLAGS, "--optimizer", "muon"])
    same = {"type": "Muon", "params": {"lr": 1e-3, "momentum": 0.95, "betas": [0.9, 0.98]}}
    assert "optimizer" not in merged(tmp_path, {"optimizer": same})
    with pytest.raises(UserError, match=r"optimizer.params.momentum to 0.9, but --muon-momentum"):
        merged(tmp_path, {"optimizer": {"params": {"momentum": 0.9}}})
    with pytest.raises(UserError, match=r"optimizer.params.ns_method is not a setting"):
        merged(tmp_path, {"optimizer": {"params": {"ns_method": "gram"}}})
    for offload in ({"offload_optimizer": {"device": "cpu"}}, {"cpu_offload": True}):
        with pytest.raises(UserError, match=r"leave offload_optimizer .* out of --deepspeed-conf"):
            merged(tmp_path, {"zero_optimization": offload})
    merged(tmp_path, {"zero_optimization": {"cpu_offload": False}})


def test_a_missing_file_is_named():
    flags = [*FLAGS, "--deepspeed-config", "no.json"]
    with pytest.raises(UserError, match=r"--deepspeed-config no.json: No such file"):
        deepspeed_config(parse_arguments(flags).resolve(1), 1)
