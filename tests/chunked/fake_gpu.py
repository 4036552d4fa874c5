"""Long sequences on a fake GPU: prints the peak of its memory in bytes, by what is done, as JSON.

Fails where the host would wait for the device.
"""

import json

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()
import torch

LENGTH, HEADS, HEAD_DIM, WIDTH = 4 * 2**20, 12, 64, 2048


def rotation():
    from megalong.model.chunked.rotary import rotate_

    x = torch.empty(LENGTH, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    rotate_(x, torch.empty(LENGTH, HEAD_DIM // 2, device="cuda"))


def swiglu():
    from megalong.model.chunked.activations import SWIGLU

    x = torch.empty(LENGTH, 2 * WIDTH, dtype=torch.bfloat16, device="cuda")
    y = SWIGLU.forward(x)
    y, grad_x = SWIGLU.backward(y, x)
    assert y.shape == (LENGTH, WIDTH) and grad_x is x


def losses():
    """The two passes over logits, whose gradient has 16 bits."""
    from megalong.model.chunked.cross_entropy import differentiate_logits_, read_logits_

    logits = torch.empty(LENGTH, WIDTH, device="cuda")
    labels = torch.empty(LENGTH, dtype=torch.int64, device="cuda")
    lse, target = read_logits_(logits, labels)
    grad = differentiate_logits_(logits, labels, lse, target, dtype=torch.bfloat16)
    assert grad.shape == logits.shape and grad.dtype == torch.bfloat16


def angles(one_per_pair):
    from megalong.config import ModelConfig
    from megalong.model.rotary import LongRotaryEmbedding

    LongRotaryEmbedding(ModelConfig(kv_channels=HEAD_DIM), one_per_pair=one_per_pair)(LENGTH)


CASES = {
    "rotation": rotation,
    "swiglu": swiglu,
    "losses": losses,
    "angles": lambda: angles(False),
    "angles, one per pair": lambda: angles(True),
}


def main() -> None:
    fake_device.pretend()
    from megalong.dry_run.fake_tensors import HostSyncs, fake_device_tensors
    from megalong.dry_run.memory import DeviceMemory

    peaks = {}
    for name, case in CASES.items():
        with DeviceMemory() as memory, fake_device_tensors(), HostSyncs(), torch.no_grad():
            case()
        peaks[name] = memory.peak.total()
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
