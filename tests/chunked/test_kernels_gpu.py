"""The kernels on a GPU: precision in each dtype, tensors of more than 2^31 numbers, no waits."""

import pytest
import torch

from megalong.model.chunked.cross_entropy import differentiate_logits_, read_logits_
from megalong.model.chunked.rotary import rotate_
from megalong.model.chunked.triton import runs_on
from tests.chunked.cases import (
    ACTIVATIONS,
    activation_case,
    logits_case,
    plain,
    read,
    rotary_case,
    rotated,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def kernels_run():
    assert runs_on(torch.empty(1, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("seed", range(6))
def test_rotation_errors_are_no_larger_than_those_of_the_plain_path(seed, dtype):
    x, angles = (t.cuda() for t in rotary_case(seed))
    angles = angles.to(torch.promote_types(dtype, torch.float32))
    x = torch.empty_like(x, dtype=dtype).copy_(x)
    before = x.clone()
    exact = rotated(x.double(), angles.double())
    plainly = rotated(x.float(), angles).to(dtype)
    rotate_(x, angles)
    if dtype == torch.float64:
        assert error(x, exact) <= 1e-14
    else:
        assert error(x, exact) <= 1.25 * error(plainly, exact)
    rotate_(x, angles, inverse=True)
    assert error(x, before) <= {8: 1e-14, 4: 1e-6, 2: 1e-2}[dtype.itemsize]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_errors_are_no_larger_than_those_of_the_plain_path(name, seed, dtype):
    activation = ACTIVATIONS[name]
    x, grad = (t.cuda().to(dtype) for t in activation_case(activation, seed))
    results = []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        y = plain(activation, leaf)
        results.append((y, *torch.autograd.grad(y, leaf, grad.to(y.dtype))))
    forward = activation.forward(x)
    found = activation.backward(grad, x)
    assert error(forward, found[0]) <= torch.finfo(dtype).eps
    for ours, theirs, exact in zip(found, *results, strict=True):
        assert error(ours, exact) <= 2 * error(theirs, exact) + {8: 1e-13}.get(dtype.itemsize, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("seed", range(6))
def test_cross_entropy_errors_are_no_larger_than_those_of_the_plain_path(seed, dtype):
    """dtype: of the gradient."""
    x, labels, first, grad = logits_case(seed)
    wide = torch.promote_types(dtype, torch.float32)
    x = torch.empty_strided(x.shape, x.stride(), dtype=wide, device="cuda").copy_(x)
    labels, grad = labels.cuda(), grad.cuda()
    *exact, labelled = read(x.double(), labels, first)
    lse, target = read_logits_(x.clone(), labels, first)
    assert torch.equal(target.double(), exact[1])
    assert error(lse, exact[0]) <= 4 * torch.finfo(wide).eps

    lse = exact[0] + 0.5  # of a whole vocabulary
    exact = ((x.double() - lse[:, None]).exp() - labelled) * grad[:, None]
    lse, grad = lse.to(wide), grad.to(wide)
    plainly = (((x - lse[:, None]).exp() - labelled) * grad[:, None]).to(dtype)
    found = differentiate_logits_(x, labels, lse, grad, first, dtype=dtype)
    assert found.dtype == dtype
    assert error(found, exact) <= 2 * error(plainly, exact) + torch.finfo(wide).eps


def huge(*shape, dtype=torch.bfloat16):
    size = dtype.itemsize * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < 1.6 * size:
        pytest.skip(f"needs {1.6 * size / 2**30:.0f} GiB")
    return torch.zeros(shape, dtype=dtype, device="cuda")


def test_rotation_of_more_than_two_to_the_31_numbers():
    length = 2**31 // 768 + 5
    x = huge(length, 1, 12, 64)
    x[-3:] = torch.randn(3, 1, 12, 64)
    angles = torch.rand(length, 32, device="cuda")
    expected = rotated(x[-3:].float(), angles[-3:])
    rotate_(x, angles)
    assert error(x[-3:], expected) < 4e-3 and not x[:-3].any()


def test_activation_of_more_than_two_to_the_31_numbers():
    x = huge(2**31 // 4096 + 3, 4096)
    x[-3:] = torch.randn(3, 4096)
    last = x[-3:].clone()
    y = ACTIVATIONS["swiglu"].forward(x)
    assert error(y[-3:], plain(ACTIVATIONS["swiglu"], last.float())) < 4e-3 and not y[:-3].any()
    y.fill_(1)
    y, grad_x = ACTIVATIONS["swiglu"].backward(y, x)
    assert error(y[-3:], plain(ACTIVATIONS["swiglu"], last.float())) < 4e-3
    assert grad_x[-3:].all() and not grad_x[:-3].any()


def test_cross_entropy_of_more_than_two_to_the_31_logits():
    x = huge(2**31 // 4096 + 3, 4096, dtype=torch.float32)
    x[-3:] = torch.randn(3, 4096)
    labels = torch.full((len(x),), 4095, device="cuda")
    exact, target, labelled = read(x[-3:].double(), labels[-3:], 0)
    slope = (x[-3:].double() - exact[:, None]).exp() - labelled
    lse, found = read_logits_(x, labels)  # the kernel leaves x as it is
    assert error(lse[-3:], exact) < 1e-6 and torch.equal(found[-3:].double(), target)
    grad = torch.zeros_like(lse)
    grad[-3:] = 1
    grad_x = differentiate_logits_(x, labels, lse, grad, dtype=torch.bfloat16)
    assert error(grad_x[-3:], slope) < 4e-3 and not grad_x[:-3].any()


def test_nothing_waits_for_the_gpu():
    x, angles = torch.randn(99, 1, 12, 64, device="cuda"), torch.rand(99, 32, device="cuda")
    logits, y = torch.randn(2, 99, 128, device="cuda")
    labels, row = torch.arange(99, device="cuda"), torch.ones(99, device="cuda")
    for mode in ("default", "error"):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            rotate_(x, angles)
            ACTIVATIONS["swiglu"].backward(y[:, :64], ACTIVATIONS["gelu"].forward(y))
            read_logits_(logits, labels)
            differentiate_logits_(logits, labels, row, row, dtype=torch.bfloat16)
        finally:
            torch.cuda.set_sync_debug_mode("default")
