"""Activations on the host, on a real GPU: the same gradients to the bit, a peak that does not grow
with the layers, and a host that never waits."""

import contextlib

import pytest
import torch

from megalong.model.chunked.offload import CHUNK, HostOffload

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ROWS, WIDTH = 2**18 + 1, 128  # 64 MiB in bfloat16, and a little
ACTIVATION = 2 * ROWS * WIDTH


def loss_of(weights, x, offload=None):
    saving = contextlib.nullcontext if offload is None else offload.saving
    for weight in weights:
        with saving():
            x = x + (x @ weight).tanh()  # keeps x and the hyperbolic tangent
    return x.float().square().mean()


def random_numbers(layers, inputs=1):
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [torch.nn.Parameter(torch.randn(WIDTH, WIDTH, **options)) for _ in range(layers)]
    return weights, [torch.randn(ROWS, WIDTH, **options) for _ in range(inputs)]


def test_gradients_and_memory():
    peaks = []
    for layers in (6, 12):
        weights, [x] = random_numbers(layers)
        expected = torch.autograd.grad(loss_of(weights, x), weights)
        offload = HostOffload(torch.device("cuda", 0))
        for mode in ("default", "error", "error"):  # the first step allocates pinned memory
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            try:
                torch.cuda.set_sync_debug_mode(mode)
                got = torch.autograd.grad(loss_of(weights, x, offload), weights)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(map(torch.equal, got, expected))
        peaks.append(torch.cuda.max_memory_allocated())
        # x is held, and all the same on the host.
        assert offload.host_bytes == layers * 2 * -(-ACTIVATION // CHUNK) * CHUNK
        del got, expected
    assert peaks[1] - peaks[0] < ACTIVATION / 2


def test_micro_batches_under_way():
    weights, inputs = random_numbers(layers=4, inputs=4)
    expected = [torch.autograd.grad(loss_of(weights, x), weights) for x in inputs]
    offload = HostOffload(torch.device("cuda", 0))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        losses = [loss_of(weights, x, offload) for x in inputs]
        for i in order:
            got = torch.autograd.grad(losses[i], weights, retain_graph=i == 0)
            assert all(map(torch.equal, got, expected[i]))
        del losses
