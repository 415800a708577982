import math

import pytest
import torch

from vcore_kernels import dft_loss, sft_loss

each_loss = pytest.mark.parametrize("loss", [sft_loss, dft_loss])


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    nll = (3 * torch.rand(3, 17, generator=generator, dtype=torch.float64)).to(dtype)
    return nll.requires_grad_(), torch.rand(3, 17, generator=generator) < 0.7


def test_sft_is_the_mean_over_supervised_tokens():
    nll, mask = batch()
    torch.testing.assert_close(sft_loss(nll), nll.mean())
    torch.testing.assert_close(sft_loss(nll, mask=mask), nll[mask].mean())
    torch.testing.assert_close(sft_loss(nll, mask=mask.long()), nll[mask].mean())
    torch.testing.assert_close(sft_loss(nll, mask=mask, num_items=5), nll[mask].sum() / 5)
    tensor = torch.tensor(5)
    assert sft_loss(nll, num_items=tensor) == sft_loss(nll, num_items=5)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_any_shape(shape):
    nll = torch.rand(shape)
    torch.testing.assert_close(sft_loss(nll), nll.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dft_follows_the_gradient_of_the_probabilities(dtype):
    nll, mask = batch(dtype)
    for chosen, count in ((None, nll.numel()), (mask, int(mask.sum()))):
        supervised = torch.ones_like(mask) if chosen is None else chosen
        (gradient,) = torch.autograd.grad(dft_loss(nll, mask=chosen), nll)
        (truth,) = torch.autograd.grad(-(-nll).exp()[supervised].sum() / count, nll)
        torch.testing.assert_close(gradient, truth)
        value = ((-nll).exp() * nll)[supervised].sum() / count
        torch.testing.assert_close(dft_loss(nll, mask=chosen), value)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(loss, dtype):
    nll, mask = batch(dtype)
    value = loss(nll, mask=mask)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), loss(nll.double(), mask=mask), rtol=1e-5, atol=0)
    value.backward()
    assert nll.grad.dtype == dtype


@each_loss
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_nothing_supervised_is_a_connected_zero(loss, num_items):
    for nll, mask in (
        (torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)),
        (torch.zeros(0, 3), None),
        (torch.zeros(2, 0), None),
    ):
        value = loss(nll.requires_grad_(), mask=mask, num_items=num_items)
        assert value == 0
        value.backward()
        assert torch.equal(nll.grad, torch.zeros_like(nll))


@each_loss
def test_compiles(loss):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    nll, mask = batch()
    value = compiled(nll, mask=mask)
    torch.testing.assert_close(value, loss(nll, mask=mask))
    torch.testing.assert_close(
        torch.autograd.grad(value, nll)[0], torch.autograd.grad(loss(nll, mask=mask), nll)[0]
    )


@each_loss
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool or integer"),
        ({"mask": torch.ones(2).bool()}, ValueError, r"mask has shape \[2\], expected \[3\]"),
        ({"num_items": -1}, ValueError, "num_items must not be negative"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must be one number"),
        ({"nll": torch.ones(3).long()}, TypeError, "nll must be a floating-point tensor"),
    ],
)
def test_bad_arguments(loss, kwargs, error, message):
    arguments = {"nll": torch.zeros(3), **kwargs}
    with pytest.raises(error, match=f"{loss.__name__}: {message}"):
        loss(**arguments)
