import math

import gibbs_oracle
import numpy as np
import pytest
import torch
from properties import HealthCheck, example, given, settings, st

from vcore_kernels import _gibbs, backends, gibbs_weights
from vcore_kernels.backends import BackendError, last_used
from vcore_kernels.backends.triton import INTERPRETED


def ragged(seed: int, dtype=torch.float32, length: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Five rows of utilities, one of them unsupervised, one with a single supervised token."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    utility = torch.randn(5, length, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(5, length, generator=generator) < 0.7
    mask[2] = False
    mask[3] = False
    mask[3, length // 2] = True
    return utility, mask


def packed(utility, mask):
    """The rows of a padded batch as packed tokens, without what the mask leaves out."""
    lengths = [row.sum() for row in mask]
    cu_seqlens = torch.tensor([0, *torch.stack(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return utility[mask], cu_seqlens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.0, 0.3, 40.0])
def test_fixed_tau_is_a_softmax(backend, dtype, tau):
    utility, mask = ragged(0, dtype)
    weights = gibbs_weights(utility, mask=mask, tau=tau, backend=backend)
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert weights.q.dtype == weights.tau.dtype == weights.kl.dtype == expected_dtype
    assert weights.q.shape == utility.shape
    assert not weights.q[~mask].any()
    for row, chosen, q, kl, ess in zip(
        utility, mask, weights.q, weights.kl, weights.ess, strict=True
    ):
        if not chosen.any():
            assert (float(kl), float(ess)) == (0, 1)
            continue
        truth = gibbs_oracle.softmax(row[chosen], tau)
        # the Triton kernel's exponents, up to 70 here, are rounded to float32
        narrow = 1e-5 if backend == "triton" else 1e-6
        tolerance = {"rtol": 1e-12 if dtype == torch.float64 else narrow, "atol": 1e-30}
        torch.testing.assert_close(q[chosen].double(), truth, **tolerance)
        assert float(kl) == pytest.approx(gibbs_oracle.kl_to_uniform(truth), abs=1e-6)
        assert float(ess) == pytest.approx(float(1 / (len(truth) * (truth**2).sum())), rel=1e-6)
    assert not weights.saturated.any()


def test_auto_takes_the_compiled_kernel_where_it_can():
    utility, mask = ragged(0)
    gibbs_weights(utility, mask=mask, tau=1.0)
    assert last_used["gibbs_weights"] == ("cpp" if backends()["cpp"] else "reference")
    with pytest.raises(BackendError, match="cannot serve"):
        gibbs_weights(utility.to("meta"), tau=1.0, backend="cpp")


def test_temperature_is_one_over_tau(backend):
    utility, mask = ragged(1)
    by_tau = gibbs_weights(utility, mask=mask, tau=4.0, backend=backend)
    by_temperature = gibbs_weights(utility, mask=mask, temperature=0.25, backend=backend)
    for one, other in zip(by_tau, by_temperature, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("budget", [1e-8, 1e-3, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_budget_is_met(backend, budget, scale):
    utility, mask = ragged(2)
    utility = utility * scale
    weights = gibbs_weights(utility, mask=mask, kl_budget=budget, backend=backend)
    for row, chosen, q, tau, kl, saturated in zip(
        utility, mask, weights.q, weights.tau, weights.kl, weights.saturated, strict=True
    ):
        if chosen.sum() < 2:
            assert saturated
            assert float(tau) == 0
            continue
        assert not saturated
        assert float(kl) == pytest.approx(budget, rel=1e-4, abs=1e-12)
        truth = gibbs_oracle.tau_for_budget([row[chosen]], budget)
        assert float(tau) == pytest.approx(truth, rel=1e-4)
        torch.testing.assert_close(
            q[chosen].double(), gibbs_oracle.softmax(row[chosen], truth), rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("budget", [1e-6, 0.05, 1.0])
def test_batch_scope_shares_one_tau(backend, budget):
    utility, mask = ragged(3)
    utility = utility * torch.tensor([1.0, 1e-3, 1, 1, 4])[:, None]
    weights = gibbs_weights(utility, mask=mask, kl_budget=budget, kl_scope="batch", backend=backend)
    trajectories = [s for s in gibbs_oracle.split(utility, mask, None) if len(s)]
    truth = gibbs_oracle.tau_for_budget(trajectories, budget)
    used = mask.sum(1) > 1
    torch.testing.assert_close(weights.tau[used], torch.full((3,), truth), rtol=1e-4, atol=0)
    assert torch.equal(weights.tau[~used], torch.zeros(2))
    # the mean over the four trajectories that have supervised tokens
    assert float(weights.kl.double().sum() / 4) == pytest.approx(budget, rel=1e-4)
    assert weights.kl[1] < 0.01 * weights.kl[4]  # hardly any difference is not sharpened
    assert not weights.saturated.any()


@pytest.mark.parametrize("scope", ["trajectory", "batch"])
def test_saturation_is_reported(backend, scope):
    utility = torch.tensor([[0.0, 3.0, 3.0, -1.0], [1.0, 0.0, 0.5, 0.999]])
    weights = gibbs_weights(utility, kl_budget=5.0, kl_scope=scope, backend=backend)
    assert weights.saturated.all()
    assert weights.tau.isfinite().all()
    expected = torch.tensor([[0, 0.5, 0.5, 0], [1.0, 0, 0, 0]])
    torch.testing.assert_close(weights.q, expected, rtol=0, atol=1e-30)
    torch.testing.assert_close(weights.kl, torch.tensor([math.log(2), math.log(4)]))
    torch.testing.assert_close(weights.ess, torch.tensor([0.5, 0.25]))
    # tau reproduces the weights
    torch.testing.assert_close((weights.tau[:, None] * utility).softmax(-1), expected)


@pytest.mark.parametrize("rule", [{"tau": 3.0}, {"kl_budget": 0.3}])
def test_constant_utilities_are_exactly_uniform(backend, rule):
    for n in (1, 2, 3, 7, 49, 1000, 4099):
        for value in (0.0, 0.1, -7e30, 3e-39, 1.7e308):
            dtype = torch.float32 if abs(value) < 1e38 else torch.float64
            utility = torch.full((n,), value, dtype=dtype)
            weights = gibbs_weights(utility, backend=backend, **rule)
            assert torch.equal(weights.q, torch.full((n,), 1 / n, dtype=dtype))
            assert (float(weights.kl), float(weights.ess)) == (0, 1)
            assert weights.constant.all()
            assert weights.tau.item() == rule.get("tau", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scope", ["trajectory", "batch"])
def test_rounding_noise_is_not_ranked(backend, dtype, scope):
    generator = torch.Generator(torch.get_default_device()).manual_seed(4)
    eps = torch.finfo(dtype).eps
    one_step = torch.randint(0, 2, (64,), generator=generator) * eps
    noise = (1 + one_step.double()).to(dtype)
    signal = (1 + 64 * one_step.double()).to(dtype)
    assert len(noise.unique()) == 2
    weights = gibbs_weights(
        torch.stack([noise, signal]), kl_budget=0.1, kl_scope=scope, backend=backend
    )
    assert weights.constant.tolist() == [True, False]
    assert weights.tau[0] == 0
    assert weights.tau[1] > 0
    assert len(weights.q[0].unique()) == 1
    assert len(weights.q[1].unique()) == 2


@pytest.mark.parametrize(
    "rule", [{"tau": 0.01}, {"kl_budget": 0.1}, {"kl_budget": 0.1, "kl_scope": "batch"}]
)
def test_adding_a_constant_changes_nothing(backend, rule):
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    utility = torch.randint(-500, 500, (3, 200), generator=generator).float()
    shift = torch.tensor([[0.0], [4096.0], [-100000.0]])  # the sums are exact in float32
    plain = gibbs_weights(utility, backend=backend, **rule)
    moved = gibbs_weights(utility + shift, backend=backend, **rule)
    for one, other in zip(plain, moved, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "rule", [{"tau": 2.0}, {"kl_budget": 0.1}, {"kl_budget": 0.1, "kl_scope": "batch"}]
)
def test_non_finite_utilities_fall_back_to_uniform(backend, bad, rule):
    utility, mask = ragged(6)
    clean = gibbs_weights(utility[1:], mask=mask[1:], backend=backend, **rule)
    utility[0, int(mask[0].nonzero()[0])] = bad
    utility[1, int((~mask[1]).nonzero()[0])] = bad  # not supervised: does not matter
    weights = gibbs_weights(utility, mask=mask, backend=backend, **rule)
    assert weights.finite.tolist() == [False, True, True, True, True]
    assert torch.equal(weights.q[0], mask[0] / mask[0].sum())
    assert weights.tau[0] == weights.kl[0] == 0
    assert weights.ess[0] == 1
    for one, other in zip(weights, clean, strict=True):
        assert torch.equal(one[1:], other)


@pytest.mark.parametrize(
    "rule", [{"tau": 2.0}, {"kl_budget": 0.1}, {"kl_budget": 0.1, "kl_scope": "batch"}]
)
def test_packed_equals_padded(backend, rule):
    utility, mask = ragged(7)
    padded = gibbs_weights(utility, mask=mask, backend=backend, **rule)
    tokens, cu_seqlens = packed(utility, mask)
    for shape in ((-1,), (1, -1)):
        flat = gibbs_weights(tokens.view(shape), cu_seqlens=cu_seqlens, backend=backend, **rule)
        assert flat.q.shape == tokens.view(shape).shape
        torch.testing.assert_close(flat.q.flatten(), padded.q[mask], rtol=1e-6, atol=0)
        torch.testing.assert_close(flat.tau, padded.tau, rtol=1e-6, atol=0)
    # supervised tokens inside packed segments
    flat = gibbs_weights(
        utility.flatten(),
        mask=mask.flatten(),
        cu_seqlens=torch.arange(6, dtype=torch.int32) * utility.shape[1],
        backend=backend,
        **rule,
    )
    assert torch.equal(flat.q.view_as(utility), padded.q)


def test_a_trajectory_does_not_depend_on_its_batch(backend):
    utility, mask = ragged(8)
    together = gibbs_weights(utility, mask=mask, kl_budget=0.2, backend=backend)
    for i in range(5):
        alone = gibbs_weights(utility[i], mask=mask[i], kl_budget=0.2, backend=backend)
        assert torch.equal(alone.q, together.q[i])
        assert alone.tau[0] == together.tau[i]


@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "number"),
    [((0, 4), None, 0), ((3, 0), None, 3), ((0,), None, 1), ((0,), [0], 0), ((0,), [0, 0, 0], 2)],
)
@pytest.mark.parametrize("rule", [{"tau": 1.0}, {"kl_budget": 1.0, "kl_scope": "batch"}])
def test_empty_input(backend, shape, cu_seqlens, number, rule):
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    weights = gibbs_weights(torch.zeros(shape), cu_seqlens=cu_seqlens, backend=backend, **rule)
    assert weights.q.shape == shape
    assert all(x.shape == (number,) for x in weights[1:])
    assert (weights.ess == 1).all()
    assert (weights.kl == 0).all()


def each_example(test):
    """The backend's fixture sets a default device once for all the examples, as it should."""
    under_test = HealthCheck.function_scoped_fixture
    return settings(
        max_examples=30 if INTERPRETED else 150,
        deadline=None,
        derandomize=True,
        suppress_health_check=[under_test],
    )(test)


finite_utilities = st.lists(
    st.one_of(
        st.floats(-3, 3, width=32),
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        st.sampled_from([0.0, 1.0, -1.0, 1e-30, 1e30, 3.4e38, -3.4e38, 1e-45]),
    ),
    min_size=1,
    max_size=40,
)


@given(finite_utilities, st.floats(0, 5), st.sampled_from(["trajectory", "batch"]))
@example([1.0, 1.0 - 2**-20, 0.0], 1.0986, "trajectory")
@example([0.0] * 39 + [1e-30, 1e30], 3.6, "batch")
@each_example
def test_any_utilities_meet_the_budget_or_say_so(backend, utilities, budget, scope):
    utility = torch.tensor(utilities, dtype=torch.float32)
    weights = gibbs_weights(utility, kl_budget=budget, kl_scope=scope, backend=backend)
    assert all(x.isfinite().all() for x in weights)
    assert float(weights.q.double().sum()) == pytest.approx(1, abs=1e-5)
    assert (weights.q >= 0).all()
    assert 0 < float(weights.ess) <= 1
    order = utility.sort().indices
    assert (weights.q[order].diff() >= 0).all()  # more useful, more weight
    kl = float(weights.kl)
    assert kl == pytest.approx(gibbs_oracle.kl_to_uniform(weights.q), abs=1e-4)
    if weights.saturated:
        assert kl <= budget + 1e-4
        reachable = 0 if weights.constant else gibbs_oracle.supremum(utility)
        assert kl == pytest.approx(reachable, abs=1e-4)
    else:
        assert kl == pytest.approx(budget, abs=1e-4)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.sampled_from([{"tau": 1.5}, {"kl_budget": 0.0}, {"kl_budget": 0.2}, {"kl_budget": 1.5}]),
    st.sampled_from(["trajectory", "batch"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 10**6),
)
@each_example
def test_kernel_agrees_with_reference(backend, lengths, rule, scope, dtype, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    size = sum(lengths)
    utility = torch.randn(size, generator=generator, dtype=dtype)
    utility = utility * 10.0 ** torch.randint(-20, 20, (), generator=generator)
    if size and seed % 5 == 0:
        utility[seed % size] = math.nan
    if seed % 7 == 0:
        utility = utility.sign()
    mask = torch.rand(size, generator=generator) < 0.8
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    one, other = (
        gibbs_weights(
            utility, mask=mask, cu_seqlens=cu_seqlens, kl_scope=scope, backend=name, **rule
        )
        for name in ("reference", backend)
    )
    for name, a, b in zip(one._fields, one, other, strict=True):
        # near saturation the KL hardly depends on tau: both meet it to 1e-9, at slightly other tau
        loose = name in ("q", "tau") and "kl_budget" in rule
        tolerance = {"rtol": 1e-3, "atol": 1e-7} if loose else {"rtol": 1e-5, "atol": 1e-12}
        if backend == "triton" and dtype == torch.float32:
            # what the sums in float32 tell of the KL, and what that leaves open of tau
            tolerance = {"rtol": 4e-3, "atol": 1e-4} if loose else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("largest", [1e-310, 1e-200, 1e200, 1.7e308])
def test_the_whole_range_of_float64(backend, largest):
    utility = torch.tensor([1.0, -1.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    plain = gibbs_weights(utility, kl_budget=0.3, backend=backend)
    scaled = gibbs_weights(utility * largest, kl_budget=0.3, backend=backend)
    torch.testing.assert_close(scaled.q, plain.q, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.kl, plain.kl)
    assert scaled.tau.isfinite().all()


def test_long_trajectories(backend):
    generator = torch.Generator(torch.get_default_device()).manual_seed(9)
    utility = torch.randn(200_000, generator=generator)
    cu_seqlens = torch.tensor([0, 150_000, 150_001, 200_000], dtype=torch.int32)
    weights = gibbs_weights(utility, cu_seqlens=cu_seqlens, kl_budget=0.5, backend=backend)
    # Gaussian utilities: KL = tau^2 / 2, ESS = exp(-tau^2)
    torch.testing.assert_close(weights.tau[[0, 2]], torch.ones(2), rtol=0.02, atol=0)
    torch.testing.assert_close(
        weights.ess[[0, 2]], torch.full((2,), math.exp(-1)), rtol=0.1, atol=0
    )
    torch.testing.assert_close(weights.kl[[0, 2]], torch.full((2,), 0.5), rtol=1e-5, atol=0)


def test_no_gradient_and_no_write(backend):
    utility, mask = ragged(10)
    before, mask_before = utility.clone(), mask.clone()
    weights = gibbs_weights(utility.requires_grad_(), mask=mask, kl_budget=0.1, backend=backend)
    assert not any(x.requires_grad for x in weights)
    assert torch.equal(utility, before)
    assert torch.equal(mask, mask_before)
    strided = gibbs_weights(
        utility.detach().t().contiguous().t(), mask=mask, kl_budget=0.1, backend=backend
    )
    assert torch.equal(strided.q, weights.q)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({}, ValueError, "exactly one of tau, temperature and kl_budget, got none"),
        ({"tau": 1.0, "kl_budget": 0.1}, ValueError, "got tau and kl_budget"),
        ({"tau": 1.0, "temperature": 1.0}, ValueError, "got tau and temperature"),
        ({"tau": -1.0}, ValueError, "tau must be a number >= 0, got -1.0"),
        ({"tau": math.nan}, ValueError, "tau must be a number >= 0, got nan"),
        ({"kl_budget": -0.1}, ValueError, "kl_budget must be a number >= 0, got -0.1"),
        ({"kl_budget": math.inf}, ValueError, "kl_budget must be a number >= 0, got inf"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, got 0.0"),
        ({"temperature": -2.0}, ValueError, "temperature must be a positive number"),
        ({"temperature": 5e-324}, ValueError, "temperature must be a positive number"),
        ({"tau": "1"}, TypeError, "tau must be a number, got str"),
        ({"tau": torch.tensor(1.0)}, TypeError, "tau must be a number, got Tensor"),
        ({"tau": 1.0, "kl_scope": "token"}, ValueError, "'trajectory' or 'batch', got 'token'"),
        ({"tau": 1.0, "backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"tau": 1.0, "mask": torch.ones(3, dtype=torch.bool)}, ValueError, "mask has shape"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        gibbs_weights(torch.zeros(2, 4), **kwargs)


def test_numpy_numbers_will_do():
    utility, mask = ragged(12)
    plain = gibbs_weights(utility, mask=mask, kl_budget=0.25)
    assert torch.equal(gibbs_weights(utility, mask=mask, kl_budget=np.float32(0.25)).q, plain.q)


@pytest.mark.parametrize("rule", ["tau", "trajectory", "batch"])
def test_reference_never_waits_for_the_device(rule):
    """On meta tensors any look at a value raises, as it would synchronise on an accelerator."""
    utility, mask = torch.zeros(12, device="meta"), torch.ones(12, device="meta").bool()
    offsets = torch.zeros(4, dtype=torch.int64, device="meta")
    results = _gibbs.reference(utility, mask, offsets, 0.3, rule, 1e-6)
    assert [tuple(x.shape) for x in results] == [(12,), (12,), (3, 3), (3, 3), (2, 2)]


def test_bad_utility():
    with pytest.raises(TypeError, match="gibbs_weights: utility must be a floating-point tensor"):
        gibbs_weights(torch.zeros(4, dtype=torch.int64), tau=1.0)
    with pytest.raises(TypeError, match="got list"):
        gibbs_weights([0.0], tau=1.0)


@pytest.mark.parametrize("rule", ["tau", "trajectory", "batch"])
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck(backend, rule, masked):
    op = torch.ops.vcore_kernels.gibbs_variance
    if backend == "reference":
        op = torch.ops.vcore_kernels.gibbs_variance_reference
    utility, mask = ragged(11, length=9)
    args = (
        utility.flatten(),
        mask.flatten() if masked else None,
        torch.arange(6) * 9,
        0.3,
        rule,
        1e-6,
    )
    torch.library.opcheck(op, args)


def test_raw_operator_refuses_nonsense():
    if not backends()["cpp"]:
        pytest.skip("the compiled kernels are not built")
    op = torch.ops.vcore_kernels.gibbs_variance
    utility, offsets = torch.zeros(4), torch.tensor([0, 4])
    with pytest.raises(RuntimeError, match="rule must be"):
        op(utility, None, offsets, 1.0, "other", 0.0)
    with pytest.raises(RuntimeError, match="offsets must rise"):
        op(utility, None, torch.tensor([0, 5]), 1.0, "tau", 0.0)
    with pytest.raises(RuntimeError, match="expected float32 or float64"):
        op(utility.half(), None, offsets, 1.0, "tau", 0.0)
    with pytest.raises(RuntimeError, match="mask must be bool"):
        op(utility, torch.ones(4), offsets, 1.0, "tau", 0.0)
