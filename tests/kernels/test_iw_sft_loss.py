import math

import pytest
import torch

from vcore_kernels import iw_sft_loss, sft_loss

LEVELS = ("sequence", "token")
each_level = pytest.mark.parametrize("level", LEVELS)


def batch(rows, length, spread=1.0):
    generator = torch.Generator().manual_seed(rows * 100 + length)
    nll = 3 * torch.rand(rows, length, generator=generator)
    ref_logp = -nll + spread * torch.randn(rows, length, generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return nll.requires_grad_(), ref_logp, mask


@each_level
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (1, 5), (5, 1), (4, 7), (7, 4)])
def test_reference_equal_to_policy_is_sft_bit_for_bit(level, shape):
    nll, _, mask = batch(*shape)
    for chosen in (None, mask):
        loss = iw_sft_loss(nll, -nll, mask=chosen, level=level)
        expected = sft_loss(nll, mask=chosen)
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(x, nll)[0] for x in (loss, expected)))


@each_level
@pytest.mark.parametrize("shape", [(3, 3), (1, 5), (5, 1), (4, 7)])
@pytest.mark.parametrize("temp", [1.0, 0.5])
@pytest.mark.parametrize("clip", [None, (0.5, 2.0)])
def test_token_by_token(level, shape, temp, clip):
    nll, ref_logp, mask = batch(*shape, spread=2.0)
    mask[0, 0] = True
    low, high = clip or {"sequence": (0, 16), "token": (0.2, 1.8)}[level]
    weights = torch.zeros(shape, dtype=torch.float64)
    for i in range(shape[0]):
        ratios = (-nll[i].detach().double() - ref_logp[i].double()).tolist()
        chosen = [ratio for ratio, kept in zip(ratios, mask[i], strict=True) if kept]
        for t in range(shape[1]):
            if mask[i, t]:
                ratio = ratios[t] if level == "token" else sum(chosen) / len(chosen)
                weights[i, t] = min(max(math.exp(temp * ratio), low), high)
    loss = iw_sft_loss(
        nll, ref_logp, mask=mask, level=level, temp=temp, clip=clip, num_items=mask.sum()
    )
    truth = (weights * nll.detach().double()).sum() / mask.sum()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss, nll)
    torch.testing.assert_close(gradient.double(), weights / mask.sum(), rtol=1e-5, atol=1e-7)


@each_level
def test_packed_equals_padded(level):
    nll, ref_logp, mask = batch(4, 6)
    padded = iw_sft_loss(nll, ref_logp, mask=mask, level=level)
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    packed = iw_sft_loss(nll[mask], ref_logp[mask], cu_seqlens=cu_seqlens, level=level)
    torch.testing.assert_close(packed, padded)
    inside = iw_sft_loss(
        nll.flatten(),
        ref_logp.flatten(),
        mask=mask.flatten(),
        cu_seqlens=torch.arange(5, dtype=torch.int32) * 6,
        level=level,
    )
    torch.testing.assert_close(inside, padded)


@each_level
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
def test_nothing_supervised_is_a_connected_zero(level, shape):
    nll = torch.full(shape, math.nan).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    loss = iw_sft_loss(nll, torch.full(shape, math.nan), mask=mask, level=level)
    assert loss == 0
    loss.backward()
    assert torch.equal(nll.grad, torch.zeros(shape))


def test_masked_tokens_do_not_enter_the_sequence_weight():
    nll, ref_logp, mask = batch(3, 5)
    mask[:, 0] = True
    loss = iw_sft_loss(nll, ref_logp, mask=mask)
    hidden = torch.where(mask, ref_logp, math.inf)
    assert torch.equal(iw_sft_loss(nll, hidden, mask=mask), loss)


@each_level
def test_far_apart_policies_are_clipped(level):
    nll = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    ref_logp = torch.tensor([[-1e30, -1e30], [1e30, 1e30]])
    low, high = {"sequence": (0, 16), "token": (0.2, 1.8)}[level]
    loss = iw_sft_loss(nll, ref_logp, level=level, num_items=1)
    assert float(loss) == pytest.approx(3 * high + 3 * low)


@each_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(level, dtype):
    nll, ref_logp, mask = batch(3, 4)
    nll = nll.detach().to(dtype).requires_grad_()
    loss = iw_sft_loss(nll, ref_logp, mask=mask, level=level)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = iw_sft_loss(nll.double(), ref_logp.double(), mask=mask, level=level)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


@each_level
def test_compiles(level):
    def run(nll, ref_logp, mask):
        return iw_sft_loss(nll, ref_logp, mask=mask, level=level)

    torch._dynamo.reset()
    arguments = batch(3, 5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"level": "batch"}, ValueError, "level must be 'sequence' or 'token', got 'batch'"),
        ({"clip": (2.0, 1.0)}, ValueError, "clip must be"),
        ({"clip": (-1.0, 1.0)}, ValueError, "clip must be"),
        ({"temp": math.nan}, ValueError, "temp must be finite"),
        ({"ref_logp": torch.zeros(2)}, ValueError, r"ref_logp has shape \[2\]"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool or integer"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "packed"),
        ({"num_items": -1}, ValueError, "num_items must not be negative"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    arguments = {"nll": torch.zeros(2, 3), "ref_logp": torch.zeros(2, 3), **kwargs}
    with pytest.raises(error, match=f"iw_sft_loss: .*{message}"):
        iw_sft_loss(**arguments)
