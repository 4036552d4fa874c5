"""Which of DeepSpeed's offloading can be planned: an optimizer in the host's memory (ZeRO-Offload).

A dry run holds it on the host, and writes down the copies and what the host computes. What is put
elsewhere, or divided between the two, neither it nor the cost model knows.
"""

from __future__ import annotations

from megalong.config import Config
from megalong.config.training import read_deepspeed_file
from megalong.utils.errors import UserError

# Settings of offload_optimizer under which it is not the whole update that the host computes.
_WHOLE = {"ratio": 1.0, "super_offload": False}


def check_offload(config: Config) -> None:
    """Raise UserError where the DeepSpeed file offloads what cannot be planned."""
    file = config.training.deepspeed_config
    if file is None:
        return
    zero = read_deepspeed_file(file).get("zero_optimization")
    if not isinstance(zero, dict):
        return

    def refuse(key: str, instead: str) -> None:
        raise UserError(
            f"--deepspeed-config {file}: zero_optimization.{key} cannot be planned: {instead}"
        )

    weights, optimizer = (
        given if isinstance(given := zero.get(key), dict) else {}
        for key in ("offload_param", "offload_optimizer")
    )
    for old in ("cpu_offload", "cpu_offload_param"):
        if zero.get(old):
            refuse(old, "set offload_optimizer instead, which took its place")
    if weights.get("device", "none") != "none":
        refuse("offload_param", "leave it out; --zero-stage 3 divides the weights over the ranks")
    if optimizer.get("device") == "nvme":
        refuse("offload_optimizer.device nvme", "set it to cpu, or leave offload_optimizer out")
    for key, usual in _WHOLE.items():
        if optimizer.get("device") == "cpu" and optimizer.get(key, usual) != usual:
            refuse(f"offload_optimizer.{key}", "leave it out")
    if "zenflow" in zero:
        refuse("zenflow", "leave it out")
