"""Activations on the host: gradients as without, whatever the order of backward passes, on a device
that makes copies as late as it may."""

import json
import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megalong.dry_run import fake_device
from megalong.model.chunked.offload import HostMemoryError, HostOffload
from tests.chunked.stand_in_device import Race, StandIn
from tests.forked import run_on_fake_gpu
from tests.launching import made_once

CPU = torch.device("cpu")
CHUNK = 256  # bytes
SHAPE = (5, 16)  # 320 bytes in float32: two chunks


FATES = [[False], [False], [True, False], []]  # of a graph: a backward pass each, retain_graph


class Layer(torch.autograd.Function):
    """x + weight * tanh(x): keeps two tensors of x's size, the weight, and a small one."""

    @staticmethod
    def forward(ctx, x, weight):
        inner = x.tanh()
        ctx.save_for_backward(x, inner.T, weight, inner.mean(1))
        return x + weight * inner

    @staticmethod
    def backward(ctx, grad):
        x, inner, weight, mean = ctx.saved_tensors
        inner = inner.T
        assert torch.equal(inner, x.tanh()) and torch.equal(mean, inner.mean(1))
        return grad + grad * weight * (1 - inner**2), (grad * inner).sum()


def offload_on(device):
    return HostOffload(CPU, chunk=CHUNK, transfers=device)


def losses_of(weights, x, offload=None):
    for weight in weights:
        if offload is None:
            x = Layer.apply(x, weight)
        else:
            with offload.saving():
                x = Layer.apply(x, weight)
    return x.square().sum()


def weights_and_inputs(layers=4, inputs=1):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(())) for _ in range(layers)]
    return weights, [torch.randn(SHAPE, requires_grad=True) for _ in range(inputs)]


def gradients(losses, leaves, **options):
    found = torch.autograd.grad(losses, leaves, **options)
    return [x.clone() for x in found]


def on_device(offload):
    return {id(s.kept) for s in offload._saved.values() if s.kept.device is not None}


def all_chunks_are_free(offload):
    return len(offload._chunks._free) * CHUNK == offload.host_bytes


def test_a_stack_of_layers():
    weights, [x] = weights_and_inputs()
    leaves = [*weights, x]
    expected = gradients(losses_of(weights, x), leaves)
    with StandIn() as device:
        offload = offload_on(device)
        for _ in range(3):  # chunks are used again
            loss = losses_of(weights, x, offload)
            assert len(on_device(offload)) == 2  # the last layer's
            assert offload.host_bytes == 4 * 2 * 2 * CHUNK
            assert all(map(torch.equal, gradients(loss, leaves), expected))
            assert all_chunks_are_free(offload)
        device.run()
    # The last layer's are still there, and so is what the caller holds: the first layer's x.
    assert device.copied == {"out": 3 * 8 * 320, "into": 3 * 5 * 320}


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_forward_and_backward(seed):
    """Of several micro batches: some twice, some never."""
    choose = random.Random(seed)
    weights, inputs = weights_and_inputs(layers=choose.randint(1, 4), inputs=6)
    expected = [gradients(losses_of(weights, x), [*weights, x]) for x in inputs]
    with StandIn() as device:
        offload = offload_on(device)
        to_come, losses = list(range(len(inputs))), {}
        while to_come or losses:
            if to_come and (not losses or choose.random() < 0.5):
                i = to_come.pop(0)
                losses[i] = losses_of(weights, inputs[i] * 1, offload)
                continue
            i, fate = choose.choice(list(losses)), choose.choice(FATES)
            for again in fate:
                got = gradients(losses[i], [*weights, inputs[i]], retain_graph=again)
                assert all(map(torch.equal, got, expected[i]))
                assert len(on_device(offload)) <= 2  # a guess, of what comes next
            del losses[i]
        assert all_chunks_are_free(offload)
        device.run()
    assert not device.queue


@pytest.mark.parametrize("forgotten", ["main", "side"])
def test_the_stand_in_sees_a_wait_that_is_forgotten(forgotten):
    weights, [x] = weights_and_inputs()
    with pytest.raises(Race), StandIn(without=forgotten) as device:
        losses_of(weights, x * 1, offload_on(device)).backward()
        device.run()


def test_what_comes_back_is_fetched_a_layer_ahead():
    weights, [x] = weights_and_inputs()
    came = []
    with StandIn() as device:
        offload = offload_on(device)
        y = x * 1
        for weight in weights:
            with offload.saving():
                y = Layer.apply(y, weight)
            y.register_hook(lambda _: came.append(device.copied["into"] // 320))
        y.sum().backward()
    # When a layer's gradient comes, before it asks for its tensors: those of layers 3 (still
    # there), 2, 1 and 0.
    assert came == [0, 2, 4, 6]


def test_two_views_of_one_storage_are_two_tensors():
    weights, [x] = weights_and_inputs()
    table = torch.randn(2, *SHAPE)

    def product(x, table, *around):
        with around[0] if around else nullcontext():
            return x * table[0] * table[1] + 1

    expected = gradients(losses_of(weights, product(x, table)), [x])
    with StandIn() as device:
        offload = offload_on(device)
        y = product(x, table.clone(), offload.saving())
        assert device.copied == {"out": 2 * 320}
        assert all(map(torch.equal, gradients(losses_of(weights, y, offload), [x]), expected))


def test_what_is_saved_several_times_is_copied_once():
    weights, [x] = weights_and_inputs()

    def f(x, *around):
        y = x * 2
        with around[0] if around else nullcontext():
            squares = (y * y + y.view(-1).square().view(SHAPE)) * y.T.contiguous().T
        return squares + 1

    expected = gradients(losses_of(weights[:1], f(x)), [x])
    with StandIn() as device:
        offload = offload_on(device)
        loss = losses_of(weights[:1], f(x, offload.saving()), offload)
        assert all(map(torch.equal, gradients(loss, [x]), expected))
    assert device.copied == {"out": 5 * 320, "into": 3 * 320}


def test_what_stays():
    weight = torch.nn.Parameter(torch.randn(16, 16))
    wide = torch.randn(SHAPE[0], 32)
    x = torch.randn(SHAPE, requires_grad=True)
    index = torch.zeros(SHAPE, dtype=torch.int64)
    with StandIn() as device:
        offload = offload_on(device)
        with offload.saving():
            y = (x @ weight.T) * wide[:, ::2]  # not the parameter's view, nor the slice
            y = y.gather(1, index) + x.sum(1, keepdim=True).exp()  # no integers, nothing small
        assert device.copied == {"out": 2 * 320}  # x and y
        with torch.no_grad(), offload.saving():
            losses_of([weight[0, 0]], x)
        assert device.copied == {"out": 2 * 320}
        y.sum().backward()


def test_on_a_cpu_nothing_is_copied():
    weights, [x] = weights_and_inputs()
    offload = HostOffload(CPU, chunk=2)
    with offload.saving():
        y = Layer.apply(x, weights[0])
    assert y.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()
    y.sum().backward()
    assert offload.host_bytes == 0


def test_a_write_before_the_copy_is_done_is_an_error():
    weights, [x] = weights_and_inputs()
    with StandIn() as device:
        for then in ("pack", "unpack"):
            offload = offload_on(device)
            y = x * 1
            with offload.saving():
                z = Layer.apply(y, weights[0])
            with torch.no_grad():
                y.zero_()
            with pytest.raises(RuntimeError, match=r"320 bytes .* modified by an in-place"):
                if then == "pack":
                    losses_of(weights[1:], z, offload)
                else:
                    z.sum().backward()


def test_no_room_on_the_host():
    weights, [x] = weights_and_inputs()
    with StandIn() as device:
        offload, pinned = offload_on(device), device.pinned

        def allocate(nbytes):
            if offload.host_bytes == 5 * CHUNK:
                raise RuntimeError("CUDA error: out of memory")
            return pinned(nbytes)

        offload._chunks.allocate = allocate
        with pytest.raises(HostMemoryError, match=r"320 bytes .* beside 1280 .*: CUDA error"):
            losses_of(weights, x, offload)
        assert all_chunks_are_free(offload)
        losses_of(weights[:1], x, offload).backward()  # what there is can be used


@pytest.fixture(scope="module")
def on_fake_device(tmp_path_factory) -> dict:
    if fake_device.compiler() is None:
        pytest.skip("the fake GPU needs a C++ compiler")

    def make(path: Path) -> None:
        run_on_fake_gpu(str(Path(__file__).with_name("offload_on_fake_device.py")), path)

    return json.loads(made_once(tmp_path_factory, "offload.json", make).read_text())


ROWS, ACTIVATION = 2**20 + 1, 2 * (2**20 + 1) * 64  # tokens, bytes: a little more than four chunks


def test_the_devices_peak_does_not_grow_with_the_layers(on_fake_device):
    def grows(stack):
        return on_fake_device[f"8 {stack}"]["device"] - on_fake_device[f"4 {stack}"]["device"]

    assert grows("kept") > 4 * 2 * ACTIVATION
    # By weights, their gradients, and what is small.
    assert 4 * 2 * ROWS < grows("offloaded") < 4 * 2 * ROWS + 4 * 2**15
    for layers in (4, 8):
        kept, found = (on_fake_device[f"{layers} {stack}"] for stack in ("kept", "offloaded"))
        assert (kept["host"], kept["out"], kept["into"]) == (0, 0, 0)
        assert (found["host"], found["out"]) == (layers * 2 * 5 * 2**25, layers * 2 * 5)
        assert found["into"] == (layers - 1) * 2 * 5


def test_a_dry_run_knows_which_copies_make_the_host_wait(on_fake_device):
    assert "(1048576,) goes to memory that is not pinned" in on_fake_device["pageable"]
    assert "a copy to the host of (1048576,) is not non_blocking" in on_fake_device["blocking"]
    assert "a copy to the device of (1048576,) is not" in on_fake_device["blocking back"]
    assert on_fake_device["pinned"] is None
    assert on_fake_device["small"] == [1, 1, 1]  # small tables in pinned memory have values
