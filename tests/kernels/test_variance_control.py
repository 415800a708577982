import math

import gibbs_oracle
import pytest
import torch
from properties import given, settings, st

from vcore_kernels import gibbs_weights, variance_control

MODES = ("utility", "trajectory", "ess", "loss", "none")
each_mode = pytest.mark.parametrize("mode", MODES)


def batch(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    utility = torch.randn(4, 23, generator=generator, dtype=torch.float64).to(dtype)
    nll = torch.rand(4, 23, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(4, 23, generator=generator) < 0.8
    return utility, nll, mask


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padded(mode, dtype):
    utility, nll, mask = batch(0, dtype)
    utility[0] += 2
    q = gibbs_weights(utility, mask=mask, kl_budget=0.3).q
    alpha = variance_control(utility, q, nll=nll, mode=mode, cap=None, mask=mask)
    truth = gibbs_oracle.alpha(
        *(gibbs_oracle.split(x, mask, None) for x in (utility, q)),
        mode,
        gibbs_oracle.split(nll, mask, None),
    )
    assert alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(alpha.double(), torch.tensor(truth).double(), rtol=1e-5, atol=0)


@each_mode
def test_padding_and_packing_do_not_matter(mode):
    utility, nll, mask = batch(1)
    q = gibbs_weights(utility, mask=mask, kl_budget=0.3).q
    padded = variance_control(utility, q, nll=nll, mode=mode, cap=None, mask=mask)
    wide = [torch.cat([x, torch.full_like(x, math.nan)], 1) for x in (utility, q, nll)]
    wide_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
    wider = variance_control(wide[0], wide[1], nll=wide[2], mode=mode, cap=None, mask=wide_mask)
    torch.testing.assert_close(wider, padded, rtol=1e-6, atol=0)
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    packed = variance_control(
        utility[mask], q[mask], nll=nll[mask], mode=mode, cap=None, cu_seqlens=cu_seqlens
    )
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)


@each_mode
def test_cap(mode):
    utility, nll, mask = batch(2)
    q = gibbs_weights(utility, mask=mask, kl_budget=0.3).q
    free = variance_control(utility, q, nll=nll, mode=mode, cap=None, mask=mask)
    for cap in (0.5, 1.0, 3.0) if mode != "none" else ():
        capped = variance_control(utility, q, nll=nll, mode=mode, cap=cap, mask=mask)
        torch.testing.assert_close(capped, free.clamp(max=cap))


@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cap", [1.0, None])
def test_uniform_weights_give_exactly_one(mode, dtype, cap):
    for length in (1, 2, 3, 7, 49, 1000, 2049):
        generator = torch.Generator().manual_seed(length)
        utility = torch.randn(2, length, generator=generator, dtype=dtype)
        nll = torch.rand(2, length, generator=generator, dtype=dtype)
        q = torch.full_like(utility, 1 / length)
        alpha = variance_control(utility, q, nll=nll, mode=mode, cap=cap)
        assert torch.equal(alpha, torch.ones_like(alpha))


@each_mode
@pytest.mark.parametrize("cap", [None, 1.0, 2.0])
def test_never_nan(mode, cap):
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    uniform = one / 3
    cases = {
        "all zero": (zero, uniform, zero, None),
        "no weight": (torch.randn(2, 3), zero, one, None),
        "nothing supervised": (one, uniform, one, torch.zeros(2, 3, dtype=torch.bool)),
        "one token": (one, one, one, torch.tensor([[1, 0, 0], [0, 0, 0]])),
        "all utilities bad": (zero / 0, uniform, zero / 0, None),
        "infinite": (one / 0, uniform, one / 0, None),
        "huge": (torch.tensor([[3e38, -3e38, 0], [1, 2, 3]]), uniform, one * 3e38, None),
        "tiny": (torch.tensor([[1e-45, 0, 0], [0, 0, 0]]), uniform, one * 1e-45, None),
    }
    for name, (utility, q, nll, mask) in cases.items():
        alpha = variance_control(utility, q, nll=nll, mode=mode, cap=cap, mask=mask)
        assert alpha.isfinite().all(), name
        assert (alpha >= 0).all(), name
        if cap is not None:
            assert (alpha <= cap).all(), name


def test_over_zero_is_the_cap():
    utility, q = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.6, 0.3]])  # q*s is constant
    utility, q = utility.double(), q.double()
    assert variance_control(utility, q, cap=2.0) == pytest.approx(2.0)
    assert variance_control(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), cap=2.0) == 2
    assert variance_control(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2), cap=None) == 1


def test_non_finite_trajectories_are_left_out():
    utility, _, mask = batch(3)
    q = gibbs_weights(utility, mask=mask, kl_budget=0.3).q
    for mode in ("utility", "trajectory"):
        without = variance_control(utility[1:], q[1:], mode=mode, cap=None, mask=mask[1:])
        broken = utility.clone()
        broken[0, int(mask[0].nonzero()[0])] = math.inf
        alpha = variance_control(broken, q, mode=mode, cap=None, mask=mask)
        torch.testing.assert_close(alpha, without)


@given(st.floats(-30, 30), st.integers(0, 1000))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_scale_of_the_utilities_does_not_matter(exponent, seed):
    utility, _, mask = batch(seed)
    q = gibbs_weights(utility, mask=mask, kl_budget=0.3).q
    plain = variance_control(utility, q, cap=None, mask=mask)
    scaled = variance_control(utility * 10.0**exponent, q, cap=None, mask=mask)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)


def test_empty_batch():
    for shape, number in (((0, 4), 0), ((3, 0), 3)):
        for mode in MODES:
            if mode == "trajectory" and number < 2:
                continue
            empty = torch.zeros(shape)
            alpha = variance_control(empty, empty, nll=empty, mode=mode)
            assert torch.equal(alpha, torch.ones(number if mode == "ess" else ()))


def test_no_gradient():
    utility, nll, mask = batch(4)
    q = gibbs_weights(utility, mask=mask, tau=1.0).q.requires_grad_()
    for mode in MODES:
        alpha = variance_control(
            utility.requires_grad_(), q, nll=nll.requires_grad_(), mode=mode, mask=mask
        )
        assert not alpha.requires_grad


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mode": "variance"}, ValueError, "one of utility, trajectory, ess, loss, none, got 'var"),
        ({"cap": 0.0}, ValueError, "cap must be a positive number or None, got 0.0"),
        ({"cap": math.inf}, ValueError, "cap must be a positive number or None, got inf"),
        ({"mode": "loss"}, ValueError, "Pass nll"),
        ({"mode": "loss", "nll": torch.ones(3)}, ValueError, "nll has shape"),
        ({"mode": "trajectory"}, ValueError, "needs at least 2, got 1"),
        ({"mask": torch.ones(1, 4)}, TypeError, "mask must be bool or integer"),
        ({"q": torch.ones(4)}, ValueError, r"q has shape \[4\], expected \[1, 4\]"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    utility = torch.zeros(1, 4)
    with pytest.raises(error, match=f"variance_control: .*{message}"):
        variance_control(utility, kwargs.pop("q", utility), **kwargs)
