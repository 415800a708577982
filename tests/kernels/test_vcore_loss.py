import math

import gibbs_oracle
import pytest
import torch

from vcore_kernels import gibbs_weights, sft_loss, variance_control, vcore_loss
from vcore_kernels.backends import last_used
from vcore_kernels.backends.triton import INTERPRETED

MODES = ("utility", "trajectory", "ess", "loss", "none")
each_mode = pytest.mark.parametrize("mode", MODES)


def batch(seed=0, dtype=torch.float32, rows=4, length=29):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    nll = torch.rand(rows, length, generator=generator, dtype=torch.float64).to(dtype)
    utility = torch.randn(rows, length, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(rows, length, generator=generator) < 0.8
    return nll.requires_grad_(), utility, mask


@each_mode
@pytest.mark.parametrize("cap", [1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradient(backend, mode, cap, dtype):
    nll, utility, mask = batch(0, dtype)
    utility[0] += 2
    result = vcore_loss(
        nll,
        utility,
        mask=mask,
        kl_budget=0.3,
        variance_control=mode,
        cap=cap,
        num_items=50,
        backend=backend,
    )
    s, losses = (gibbs_oracle.split(x.detach(), mask, None) for x in (utility, nll))
    q = [gibbs_oracle.softmax(x, gibbs_oracle.tau_for_budget([x], 0.3)) for x in s]
    alpha = torch.tensor(gibbs_oracle.alpha(s, q, mode, losses), dtype=torch.float64)
    alpha = alpha if cap is None else alpha.clamp(max=cap)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for row, chosen, weights, a in zip(expected, mask, q, alpha.expand(4), strict=True):
        row[chosen] = a * weights * len(weights)
    tolerance = {"rtol": 1e-4, "atol": 0}
    torch.testing.assert_close(result.alpha.double(), alpha, **tolerance)
    torch.testing.assert_close(result.weights.double(), expected, **tolerance)
    truth = (expected * nll.detach().double()).sum() / 50
    torch.testing.assert_close(result.loss.double(), truth, **tolerance)
    assert result.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    result.loss.backward()
    assert nll.grad.dtype == dtype
    torch.testing.assert_close(
        nll.grad.double(), expected / 50, rtol=max(1e-4, torch.finfo(dtype).eps), atol=0
    )
    assert last_used["vcore_loss"] == backend


@each_mode
def test_the_parts_fit_together(backend, mode):
    nll, utility, mask = batch(1)
    result = vcore_loss(
        nll, utility, mask=mask, temperature=0.5, variance_control=mode, cap=None, backend=backend
    )
    weights = gibbs_weights(utility, mask=mask, temperature=0.5, backend=backend)
    alpha = variance_control(utility, weights.q, nll=nll, mode=mode, cap=None, mask=mask)
    torch.testing.assert_close(result.alpha, alpha)
    scale = (alpha * mask.sum(1)).unsqueeze(-1)
    torch.testing.assert_close(result.weights, scale * weights.q)
    for name in ("tau", "kl", "ess", "saturated", "constant", "finite"):
        assert torch.equal(getattr(result, name), getattr(weights, name))
    assert not any(x.requires_grad for x in result[1:])


@each_mode
@pytest.mark.parametrize("rule", [{"tau": 2.0}, {"kl_budget": 0.1}, {"kl_budget": 0.0}])
def test_uniform_weights_are_sft_bit_for_bit(backend, mode, rule):
    lengths = [*range(1, 40), 63, 64, 65, 127, 1000, 1023, 4097]
    if INTERPRETED:  # slow
        lengths = [1, 2, 7, 39, 65, 1000, 4097]
    for length in lengths:
        generator = torch.Generator(torch.get_default_device()).manual_seed(length)
        rows = 1 if length % 3 == 0 and mode != "trajectory" else 3
        utility = torch.randn(rows, 1, generator=generator).repeat(1, length)
        if rule.get("kl_budget") == 0:
            utility = torch.randn(rows, length, generator=generator)
        values = torch.rand(rows, length, generator=generator) * 9
        mask = None if length % 2 else torch.rand(rows, length, generator=generator) < 0.6
        items = length if length % 5 == 0 else None
        one, other = values.clone().requires_grad_(), values.clone().requires_grad_()
        result = vcore_loss(
            one,
            utility,
            mask=mask,
            variance_control=mode,
            num_items=items,
            backend=backend,
            **rule,
        )
        expected = sft_loss(other, mask=mask, num_items=items)
        assert torch.equal(result.loss, expected), length
        result.loss.backward()
        expected.backward()
        assert torch.equal(one.grad, other.grad), length
        assert torch.equal(result.alpha, torch.ones_like(result.alpha))
        supervised = result.weights if mask is None else result.weights[mask]
        assert torch.equal(supervised, torch.ones_like(supervised))


@each_mode
@pytest.mark.parametrize("nll_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("utility_dtype", [torch.float32, torch.float64, torch.float16])
def test_the_loss_keeps_the_precision_of_nll(mode, nll_dtype, utility_dtype):
    nll, _, mask = batch(8, nll_dtype)
    utility = torch.ones(nll.shape, dtype=utility_dtype)
    result = vcore_loss(nll, utility, mask=mask, kl_budget=0.1, variance_control=mode)
    expected = sft_loss(nll, mask=mask)
    assert result.loss.dtype == result.weights.dtype == result.alpha.dtype == expected.dtype
    assert torch.equal(result.loss, expected)


def test_packed_equals_padded(backend):
    nll, utility, mask = batch(2)
    padded = vcore_loss(nll, utility, mask=mask, kl_budget=0.3, backend=backend)
    cu_seqlens = torch.tensor([0, *mask.sum(1).cumsum(0).tolist()], dtype=torch.int32)
    for shape in ((-1,), (1, -1)):
        packed = vcore_loss(
            nll[mask].view(shape),
            utility[mask].view(shape),
            cu_seqlens=cu_seqlens,
            kl_budget=0.3,
            backend=backend,
        )
        torch.testing.assert_close(packed.loss, padded.loss)
        torch.testing.assert_close(packed.weights.flatten(), padded.weights[mask])
    by_ess = vcore_loss(
        nll[mask],
        utility[mask],
        cu_seqlens=cu_seqlens,
        kl_budget=0.3,
        variance_control="ess",
        backend=backend,
    )
    assert by_ess.alpha.shape == (4,)
    rows = vcore_loss(
        nll, utility, mask=mask, kl_budget=0.3, variance_control="ess", backend=backend
    )
    torch.testing.assert_close(by_ess.weights, rows.weights[mask])


def test_accumulated_micro_batches_share_one_denominator(backend):
    nll, utility, mask = batch(3)
    options = {"tau": 1.0, "variance_control": "none", "backend": backend}
    whole = vcore_loss(nll, utility, mask=mask, **options).loss
    items = mask.sum()
    parts = [
        vcore_loss(nll[i : i + 1], utility[i : i + 1], mask=mask[i : i + 1], num_items=n, **options)
        for i, n in enumerate((items, int(items), items.float(), items.reshape(1)))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole)


@each_mode
def test_nothing_supervised_is_a_connected_zero(backend, mode):
    for nll, mask in (
        (torch.full((2, 5), math.nan), torch.zeros(2, 5, dtype=torch.bool)),
        (torch.zeros(2, 0), None),
    ):
        nll.requires_grad_()
        result = vcore_loss(
            nll,
            torch.randn(nll.shape),
            mask=mask,
            kl_budget=0.1,
            variance_control=mode,
            backend=backend,
        )
        assert result.loss == 0
        result.loss.backward()
        assert torch.equal(nll.grad, torch.zeros_like(nll))
        assert all(x.isfinite().all() for x in result)


@each_mode
def test_hostile_utilities_leave_a_finite_loss(backend, mode):
    nll, utility, mask = batch(4)
    utility[0, 1], mask[0, 1] = math.nan, True
    utility[1, 1], mask[1, 1] = -math.inf, True
    utility[2] *= 1e30
    result = vcore_loss(
        nll, utility, mask=mask, kl_budget=0.1, variance_control=mode, backend=backend
    )
    assert result.finite.tolist() == [False, False, True, True]
    assert all(x.isfinite().all() for x in result)
    factor = result.alpha if mode != "ess" else torch.ones(())
    assert torch.equal(result.weights[0], mask[0] * factor)
    result.loss.backward()
    assert nll.grad.isfinite().all()


def test_a_graph_serves_twice_and_inputs_stay(backend):
    nll, utility, mask = batch(5)
    copies = [x.detach().clone() for x in (nll, utility, mask)]
    loss = vcore_loss(nll, utility, mask=mask, kl_budget=0.1, backend=backend).loss
    loss.backward(retain_graph=True)
    once = nll.grad.clone()
    loss.backward()
    assert torch.equal(nll.grad, 2 * once)
    for tensor, copy in zip((nll, utility, mask), copies, strict=True):
        assert torch.equal(tensor, copy)


@each_mode
def test_nothing_waits_for_the_device(mode):
    """On meta tensors any look at a value raises, as it would synchronise on an accelerator."""
    nll, utility, mask = (x.detach().to("meta") for x in batch(7))
    result = vcore_loss(
        nll.requires_grad_(), utility, mask=mask, kl_budget=0.1, variance_control=mode
    )
    assert result.loss.shape == ()
    result.loss.backward()
    q = torch.zeros_like(utility)
    variance_control(utility, q, nll=nll, mode=mode, mask=mask)


def test_gradcheck_and_forward_mode():
    nll, utility, mask = batch(6, torch.float64, rows=2, length=5)

    def loss(x):
        return vcore_loss(x, utility, mask=mask, kl_budget=0.1, cap=None).loss

    torch.autograd.gradcheck(loss, (nll,), check_forward_ad=True)
    tangent = torch.ones_like(nll)
    _, derivative = torch.func.jvp(loss, (nll.detach(),), (tangent,))
    torch.testing.assert_close(derivative, torch.autograd.grad(loss(nll), nll)[0].sum())
    assert derivative != 0


@pytest.mark.parametrize(
    ("backend", "mode"), [*(("auto", mode) for mode in MODES), ("reference", "utility")]
)
def test_compiles_without_a_graph_break(backend, mode):
    def run(nll, utility, mask, budget):
        return vcore_loss(
            nll, utility, mask=mask, kl_budget=budget, variance_control=mode, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for seed, budget in enumerate((0.1, 0.2)):
        nll, utility, mask = batch(seed)
        expected, result = (f(nll, utility, mask, budget) for f in (run, compiled))
        for one, other in zip(expected, result, strict=True):
            torch.testing.assert_close(one, other)
        gradients = [torch.autograd.grad(x.loss, nll)[0] for x in (expected, result)]
        assert torch.equal(*gradients)


def test_compiles_packed():
    def run(nll, utility, cu_seqlens):
        return vcore_loss(nll, utility, cu_seqlens=cu_seqlens, kl_budget=0.1, kl_scope="batch")

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (7, 12):
        generator = torch.Generator(torch.get_default_device()).manual_seed(length)
        nll, utility = torch.rand(2, length, generator=generator).unbind()
        cu_seqlens = torch.tensor([0, 2, 2, length], dtype=torch.int32)
        expected, result = (f(nll, utility, cu_seqlens) for f in (run, compiled))
        for one, other in zip(expected, result, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "exactly one of tau, temperature and kl_budget, got none"),
        ({"tau": 1.0, "temperature": 2.0}, ValueError, "got tau and temperature"),
        ({"kl_budget": -1.0}, ValueError, "kl_budget must be a number >= 0"),
        ({"tau": 1.0, "variance_control": "all"}, ValueError, "must be one of utility"),
        ({"tau": 1.0, "cap": -1.0}, ValueError, "cap must be a positive number"),
        ({"tau": 1.0, "kl_scope": "row"}, ValueError, "kl_scope must be"),
        ({"tau": 1.0, "num_items": -3}, ValueError, "num_items must not be negative, got -3"),
        ({"tau": 1.0, "num_items": torch.ones(2)}, ValueError, "num_items must be one number"),
        ({"tau": 1.0, "mask": torch.ones(2, 4)}, TypeError, "mask must be bool or integer"),
        ({"tau": 1.0, "cu_seqlens": torch.tensor([0, 8])}, ValueError, "packed"),
        ({"tau": 1.0, "utility": torch.ones(2, 5)}, ValueError, r"utility has shape \[2, 5\]"),
        ({"tau": 1.0, "utility": torch.ones(2, 4).long()}, TypeError, "utility must be a float"),
        ({"tau": 1.0, "nll": torch.ones(2, 4).long()}, TypeError, "nll must be a float"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    nll, utility = kwargs.pop("nll", torch.zeros(2, 4)), kwargs.pop("utility", torch.zeros(2, 4))
    with pytest.raises(error, match=f"vcore_loss: .*{message}"):
        vcore_loss(nll, utility, **kwargs)


def test_one_trajectory_has_no_variance_over_trajectories():
    with pytest.raises(ValueError, match=r"vcore_loss: mode 'trajectory'.*at least 2, got 1"):
        vcore_loss(torch.zeros(4), torch.zeros(4), tau=1.0, variance_control="trajectory")
