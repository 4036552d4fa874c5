"""Which of DeepSpeed's offloading can be planned, and what the estimate makes of it."""

import json

import pytest

from megalong.config.arguments import config_from_values
from megalong.dry_run.layouts import check_offload
from megalong.model.memory_path import needs
from megalong.model.parameters import count_parameters
from megalong.utils.errors import UserError

VALUES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 256,
    "zero_stage": 3,
    "memory_path": "off",
    "data_path": ("unread",),
    "tokenizer_type": "ByteTokenizer",
}


def config(tmp_path, **zero_optimization):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero_optimization}))
    return config_from_values({**VALUES, "deepspeed_config": str(file)}).resolve(2)


@pytest.mark.parametrize(
    ("zero_optimization", "key"),
    [
        ({"offload_param": {"device": "cpu"}}, "offload_param cannot be planned: leave it out"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device nvme cannot be"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, "offload_optimizer.ratio cannot"),
        (
            {"offload_optimizer": {"device": "cpu", "super_offload": True}},
            "offload_optimizer.super_offload cannot be planned",
        ),
        ({"zenflow": {}}, "zenflow cannot be planned"),
    ],
)
def test_what_cannot_be_planned(tmp_path, zero_optimization, key):
    with pytest.raises(UserError, match=f"deepspeed.json: zero_optimization.{key}") as raised:
        check_offload(config(tmp_path, **zero_optimization))
    assert "\n" not in str(raised.value)


def test_what_can_be_planned(tmp_path):
    check_offload(config_from_values(VALUES).resolve(2))
    check_offload(config(tmp_path))
    check_offload(config(tmp_path, offload_param={"device": "none"}))
    check_offload(config(tmp_path, offload_optimizer={"device": "cpu", "pin_memory": False}))


def test_an_optimizer_on_the_host_is_not_on_the_device_in_the_estimate(tmp_path):
    """Which has float32 weights and two moments less, a half of them."""
    plain = config(tmp_path)
    on_device = needs(plain, 256, replicas=2).device
    on_host = needs(config(tmp_path, offload_optimizer={"device": "cpu"}), 256, replicas=2).device
    count = count_parameters(plain.model, 256)
    assert on_device - on_host == pytest.approx(12 * (count.used + count.padding) / 2)
