"""Memory at the peak of what works over tiles, on a GPU that is not there: passes over millions of
rows, and pieces with few and many rows, forward and backward.

Prints {"passes": {case: bytes}, "pieces": {case: [bytes]}} as JSON; a row of a piece is BATCH
tokens. Fails where the host would wait for the device in a pass.
"""

import json

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()
import torch

LENGTH, HEADS, HEAD_DIM, WIDTH = 2**22, 12, 64, 2048  # of passes
BATCH, HIDDEN, VOCABULARY, CHUNK = 2, 64, 32000, 128  # of pieces
ROWS = (1024, 4096)


def tensor(*shape: int, dtype=torch.bfloat16, grad=True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def rotation():
    from megalong.model.chunked.rotary import rotate_

    rotate_(
        tensor(LENGTH, 1, HEADS, HEAD_DIM, grad=False),
        torch.empty(LENGTH, HEAD_DIM // 2, device="cuda"),
    )


def swiglu():
    from megalong.model.chunked.mlp import SWIGLU

    x = tensor(LENGTH, 2 * WIDTH, grad=False)
    y = SWIGLU.forward(x)
    y, grad_x = SWIGLU.backward(y, x)
    assert y.shape == (LENGTH, WIDTH) and grad_x is x


def logits():
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


def losses(rows: int, divides_rows: bool | None = None) -> torch.Tensor:
    """divides_rows: of two ranks; None: of one."""
    from megalong.model.chunked.cross_entropy import linear_cross_entropy
    from megalong.model.chunked.rows import ALONE, TensorRanks

    ranks = ALONE
    if divides_rows is not None:
        ranks = TensorRanks(2, 1, torch.distributed.group.WORLD, divides_rows)
    x, labels = (
        tensor(rows // ranks.shares, BATCH, HIDDEN),
        tensor(rows, BATCH, dtype=torch.int64, grad=False),
    )
    return linear_cross_entropy(
        x, tensor(VOCABULARY, HIDDEN), labels, chunk_size=CHUNK, ranks=ranks
    )


def norm(rows: int, kind: str) -> torch.Tensor:
    from megalong.model.chunked.norms import tiled_norm

    bias = tensor(HIDDEN) if kind == "LayerNorm" else None
    x, weight = tensor(rows, BATCH, HIDDEN), tensor(HIDDEN)
    return tiled_norm(x, weight, bias, kind=kind, eps=1e-5, tile_size=CHUNK)


PASSES = {
    "rotation": rotation,
    "swiglu": swiglu,
    "logits": logits,
    "angles": lambda: angles(False),
    "angles, one per pair": lambda: angles(True),
}
PIECES = {
    "losses": losses,
    "losses of ranks": lambda rows: losses(rows, False),
    "losses of ranks that divide the rows": lambda rows: losses(rows, True),
    "RMSNorm": lambda rows: norm(rows, "RMSNorm"),
    "LayerNorm": lambda rows: norm(rows, "LayerNorm"),
}


def main() -> None:
    fake_device.pretend()
    from megalong.dry_run.fake_tensors import HostSyncs, fake_device_tensors
    from megalong.dry_run.memory import DeviceMemory
    from megalong.utils.torch_private import FakeStore

    passes, pieces = {}, {}
    for name, case in PASSES.items():
        with DeviceMemory() as memory, fake_device_tensors(), HostSyncs(), torch.no_grad():
            case()
        passes[name] = memory.peak.total()
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    for name, piece in PIECES.items():
        for rows in ROWS:
            memory = DeviceMemory()
            with fake_device_tensors(), memory:
                result = piece(rows)
                result.backward(torch.ones_like(result))
                del result
            pieces.setdefault(name, []).append(memory.peak.total())
    torch.distributed.destroy_process_group()
    print(json.dumps({"passes": passes, "pieces": pieces}))


if __name__ == "__main__":
    main()
