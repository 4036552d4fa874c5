"""What pieces over tiles hold at their peak, on a GPU that is not there.

Writes {case: bytes by number of rows} as JSON to the file it is given; a row is BATCH tokens.
"""

import json
import sys
from pathlib import Path

from megalong.dry_run import fake_device

if __name__ == "__main__":
    fake_device.load()
import torch

BATCH, HIDDEN, VOCABULARY, CHUNK = 2, 64, 32000, 128
ROWS = (1024, 4096)


def tensor(*shape: int, dtype=torch.bfloat16, grad=True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def losses(rows: int, **how) -> torch.Tensor:
    from megalong.model.chunked.linear_cross_entropy import linear_cross_entropy

    x = tensor(rows // how["ranks"].shares if how else rows, BATCH, HIDDEN)
    labels = tensor(rows, BATCH, dtype=torch.int64, grad=False)
    return linear_cross_entropy(x, tensor(VOCABULARY, HIDDEN), labels, chunk_size=CHUNK, **how)


def losses_of_ranks(rows: int, divides_rows: bool) -> torch.Tensor:
    from megalong.model.chunked.tensor_ranks import TensorRanks

    ranks = TensorRanks(2, 1, torch.distributed.group.WORLD, divides_rows)
    return losses(rows, ranks=ranks)


def norm(rows: int, kind: str) -> torch.Tensor:
    from megalong.model.chunked.norms import tiled_norm

    bias = tensor(HIDDEN) if kind == "LayerNorm" else None
    x, weight = tensor(rows, BATCH, HIDDEN), tensor(HIDDEN)
    return tiled_norm(x, weight, bias, kind=kind, eps=1e-5, tile_size=CHUNK)


CASES = {
    "losses": losses,
    "losses of ranks": lambda rows: losses_of_ranks(rows, False),
    "losses of ranks that divide the rows": lambda rows: losses_of_ranks(rows, True),
    "RMSNorm": lambda rows: norm(rows, "RMSNorm"),
    "LayerNorm": lambda rows: norm(rows, "LayerNorm"),
}


def main(output: str) -> None:
    fake_device.pretend()
    from megalong.dry_run.fake_tensors import fake_device_tensors
    from megalong.dry_run.memory import DeviceMemory
    from megalong.utils.torch_private import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    peaks = {}
    for name, piece in CASES.items():
        for rows in ROWS:
            memory = DeviceMemory()
            with fake_device_tensors(), memory:
                result = piece(rows)
                result.backward(torch.ones_like(result))
                del result
            peaks.setdefault(name, {})[rows] = memory.peak.total()
    torch.distributed.destroy_process_group()
    Path(output).write_text(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1])
