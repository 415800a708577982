import itertools
import math
from fractions import Fraction

import pytest
import torch
from properties import example, given, settings, st

from vcore_kernels import NothingToAllocateError, gvm_allocate, gvm_variance, gvm_variance_bound

f64 = torch.float64


def tensors(*columns):
    return [torch.tensor(column, dtype=f64) for column in columns]


def weights(grad_norm, accept_rate, alpha=1e-3, beta=2.0):
    return [
        g / math.sqrt(p + alpha / p ** (beta - 1)) if g > 0 and p > 0 else 0.0
        for g, p in zip(grad_norm, accept_rate, strict=True)
    ]


def by_the_book(grad_norm, accept_rate, budget, most=None, least=None):
    """The specification in Python, one line a step, quotas of the double-precision shares exact."""
    a = weights(grad_norm, accept_rate)
    r = [x / sum(a) for x in a]
    r = [0 if most is not None and p > most else x for x, p in zip(r, accept_rate, strict=True)]
    if least is not None:
        r = [0 if p * x * budget < least else x for x, p in zip(r, accept_rate, strict=True)]
    r = [Fraction(x) for x in r]
    quota = [x / sum(r) * budget for x in r]
    counts = [round(x) for x in quota]
    missing = budget - sum(counts)
    step = 1 if missing > 0 else -1
    order = sorted(range(len(r)), key=lambda i: -step * (quota[i] - counts[i]))
    for i in order[: abs(missing)]:
        counts[i] += step
    return counts


def allocations(budget, prompts):
    """Every way of giving ``budget`` samples to ``prompts`` prompts."""
    for cuts in itertools.combinations(range(budget + prompts - 1), prompts - 1):
        edges = (-1, *cuts, budget + prompts - 1)
        yield [b - a - 1 for a, b in itertools.pairwise(edges)]


def bound(a, counts):
    return sum(
        0 if x == 0 else math.inf if n == 0 else x * x / n for x, n in zip(a, counts, strict=True)
    )


rates = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))
norms = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
prompts = st.lists(st.tuples(norms, rates), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompts, st.integers(0, 300), st.none() | st.floats(0, 1), st.none() | st.floats(0, 3))
@example([(1.0, 0.5)] * 6, 9, None, None)  # six quotas of 1.5: all round to 2, the first three lose
@example([(1.0, 0.5)] * 6, 3, None, None)  # six of 0.5: all round to 0, the first three gain
@example([(0.0, 0.5), (1.0, 0.5), (1.0, 0.0), (1.0, 0.5)], 7, None, None)
def test_the_specification(rows, budget, most, least):
    grad_norm, accept_rate = (list(column) for column in zip(*rows, strict=True))
    arguments = (*tensors(grad_norm, accept_rate), budget)
    options = {"max_accept_rate": most, "min_expected_accepts": least}
    try:
        counts = gvm_allocate(*arguments, **options)
    except NothingToAllocateError:
        a = weights(grad_norm, accept_rate)
        share = [x / (sum(a) or 1) for x in a]
        assert all(
            x == 0 or (most is not None and p > most) or (least or 0) > p * x * budget
            for x, p in zip(share, accept_rate, strict=True)
        )
        return
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == budget
    assert bool((counts >= 0).all())
    assert counts.tolist() == by_the_book(grad_norm, accept_rate, budget, most, least)
    scaled = gvm_allocate(arguments[0] * 0.37, *arguments[1:], **options)
    assert torch.equal(scaled, counts)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 0.1, 3.0, 7e11, 1e300])
def test_ties_do_not_depend_on_the_scale(scale):
    grad_norm, accept_rate = tensors([1, 3, 2, 2, 5, 3], [0.5] * 6)
    counts = gvm_allocate(grad_norm, accept_rate, 8)  # quotas 0.5 1.5 1 1 2.5 1.5
    assert counts.tolist() == [0, 2, 1, 1, 2, 2]
    assert torch.equal(gvm_allocate(scale * grad_norm, accept_rate, 8), counts)


@pytest.mark.parametrize("quota", [[1, 2, 3], [4, 1, 1, 2], [2, 2, 2, 2], [5, 1, 0, 3]])
def test_whole_quotas_are_the_brute_force_minimum(quota):
    accept_rate = torch.tensor([0.3, 0.9, 0.1, 0.5], dtype=f64)[: len(quota)]
    a = torch.tensor(quota, dtype=f64)
    grad_norm = a * (accept_rate + 1e-3 / accept_rate).sqrt()
    budget = sum(quota)
    counts = gvm_allocate(grad_norm, accept_rate, budget).tolist()
    best = min(allocations(budget, len(quota)), key=lambda n: bound(a.tolist(), n))
    assert counts == best == quota
    least = gvm_variance_bound(grad_norm, accept_rate, budget)
    assert least == pytest.approx(bound(a.tolist(), counts), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_rounding_is_nearest_and_near_the_brute_force_minimum(seed):
    generator = torch.Generator().manual_seed(seed)
    grad_norm = 0.5 + torch.rand(4, dtype=f64, generator=generator)
    accept_rate = 0.1 + 0.9 * torch.rand(4, dtype=f64, generator=generator)
    budget = 12 + seed
    counts = gvm_allocate(grad_norm, accept_rate, budget).tolist()
    a = weights(grad_norm.tolist(), accept_rate.tolist())
    quota = [x / sum(a) * budget for x in a]
    every = list(allocations(budget, 4))
    nearest = min(every, key=lambda n: math.dist(n, quota))
    assert counts == nearest
    # sum a^2/n = (sum a)^2/N * (1 + sum (quota - n)^2/n / N): nothing but the rounding is lost.
    least = gvm_variance_bound(grad_norm, accept_rate, budget)
    lost = sum((q - n) ** 2 / n for q, n in zip(quota, counts, strict=True)) / budget
    assert bound(a, counts) == pytest.approx(least * (1 + lost), rel=1e-12)
    best = min(bound(a, n) for n in every)
    assert least <= best <= bound(a, counts) <= 1.03 * best


def test_order_of_the_limits():
    # The share of the easy prompt is gone, not handed on, when expected accepts are counted.
    grad_norm, accept_rate = tensors([6, 2, 2], [1.0, 0.5, 0.25])
    a = weights(grad_norm.tolist(), accept_rate.tolist())
    expected = [p * x / sum(a) * 10 for x, p in zip(a, accept_rate.tolist(), strict=True)]
    assert expected[1] > 1 > expected[2]
    options = {"max_accept_rate": 0.9, "min_expected_accepts": 1}
    assert gvm_allocate(grad_norm, accept_rate, 10, **options).tolist() == [0, 10, 0]
    kept = gvm_allocate(grad_norm[1:], accept_rate[1:], 10, min_expected_accepts=1)
    assert (kept > 0).all()
    at_the_limits = {"max_accept_rate": 1.0, "min_expected_accepts": expected[2]}
    assert (gvm_allocate(grad_norm, accept_rate, 10, **at_the_limits) > 0).all()


def test_regularisation():
    grad_norm, accept_rate = tensors([1, 1], [0.01, 0.5])
    for alpha, beta in [(0.0, 2.0), (1e-3, 2.0), (1e-2, 3.0)]:
        a = weights([1, 1], accept_rate.tolist(), alpha, beta)
        counts = gvm_allocate(grad_norm, accept_rate, 10**6, alpha=alpha, beta=beta)
        assert float(counts[0]) == pytest.approx(1e6 * a[0] / sum(a), abs=1)
        least = gvm_variance_bound(10 * grad_norm, accept_rate, 7, alpha=alpha, beta=beta)
        assert least == pytest.approx(100 * sum(a) ** 2 / 7)


def test_nothing_left_says_how_many_and_why():
    grad_norm, accept_rate = tensors([0, 1, 1, 0, 1, 9], [0, 0, 0.95, 0.5, 0.1, 0.5])
    with pytest.raises(
        NothingToAllocateError,
        match="64 samples: of 6 prompts 2 have accept_rate 0, 1 others grad_norm 0, "
        "1 lie above max_accept_rate, 2 below min_expected_accepts",
    ):
        gvm_allocate(grad_norm, accept_rate, 64, max_accept_rate=0.9, min_expected_accepts=1000)
    for empty in (torch.zeros(3), torch.zeros(0)):
        with pytest.raises(ValueError, match=f"of {len(empty)} prompts {len(empty)} have"):
            gvm_allocate(empty, empty, 8)


def test_many_prompts_and_hostile_numbers():
    generator = torch.Generator().manual_seed(0)
    grad_norm = torch.randn(200_000, generator=generator).exp()
    accept_rate = torch.randint(9, (200_000,), generator=generator) / 8
    for budget in (1, 1000, 1_600_003, 2**40):
        counts = gvm_allocate(grad_norm, accept_rate, budget)
        assert int(counts.sum()) == budget
        assert not counts[accept_rate == 0].any()
        assert bool((counts >= 0).all())
    tiny = torch.finfo(f64).tiny
    assert gvm_allocate(*tensors([1e308, 1e308], [tiny, 1.0]), 4).tolist() == [0, 4]
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert gvm_allocate(half, half / 4, torch.tensor(6)).sum() == 6


def test_variance_of_a_prompt():
    rms, mean, p, n = tensors(
        [2, 2, 0, 3, 3], [1, 1, 0, 0, 3], [0.5, 0.5, 0.5, 0.0, 1.0], [1, 4, 2, 3, 2]
    )
    assert gvm_variance(rms, mean, p, n.long()).tolist() == [7, 7 / 4, 0, 0, 0]
    assert gvm_variance(rms, mean, p, torch.zeros(5).int()).tolist() == [
        math.inf,
        math.inf,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_norm": torch.ones(3, dtype=torch.int64)}, TypeError, "grad_norm must be a float"),
        ({"grad_norm": [1.0, 2.0]}, TypeError, "grad_norm must be a float.*list"),
        ({"grad_norm": torch.ones(2, 1)}, ValueError, r"grad_norm has shape \[2, 1\]"),
        ({"grad_norm": torch.tensor([1.0, -2.0])}, ValueError, r"grad_norm\[1\] is -2.0"),
        ({"grad_norm": torch.tensor([math.nan, 1.0])}, ValueError, r"grad_norm\[0\] is nan"),
        ({"grad_norm": torch.tensor([math.inf, 1.0])}, ValueError, r"grad_norm\[0\] is inf"),
        ({"accept_rate": torch.ones(3)}, ValueError, r".*has shape \[3\], expected \[2\]"),
        ({"accept_rate": torch.tensor([0.5, 1.5])}, ValueError, r"accept_rate\[1\] is 1.5"),
        ({"accept_rate": torch.tensor([0.5, math.nan])}, ValueError, r"accept_rate\[1\] is nan"),
        ({"budget": 2.5}, TypeError, "budget must be a whole number of samples, got 2.5"),
        ({"budget": -1}, ValueError, "budget must be 0 to"),
        ({"budget": 2**41}, ValueError, "budget must be 0 to"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite"),
        ({"beta": math.nan}, ValueError, "beta must be finite"),
        ({"max_accept_rate": 1.5}, ValueError, "max_accept_rate must be in"),
        ({"min_expected_accepts": -1.0}, ValueError, "min_expected_accepts must be"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = {"grad_norm": torch.ones(2), "accept_rate": torch.ones(2) / 2, "budget": 4}
    with pytest.raises(error, match=f"gvm_allocate: {message}"):
        gvm_allocate(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": torch.ones(2)}, TypeError, "counts must be an integer tensor"),
        ({"counts": torch.tensor([1, -1])}, ValueError, r"counts\[1\] is -1"),
        ({"grad_rms": torch.tensor([math.nan, 1])}, ValueError, r"grad_rms\[0\] is nan"),
        ({"mean_grad_norm": torch.ones(3)}, ValueError, r"mean_grad_norm has shape \[3\]"),
    ],
)
def test_bad_arguments_of_the_variance(change, error, message):
    ones = torch.ones(2)
    arguments = {"grad_rms": ones, "mean_grad_norm": ones, "accept_rate": ones}
    with pytest.raises(error, match=f"gvm_variance: {message}"):
        gvm_variance(**{**arguments, "counts": torch.tensor([1, 1]), **change})


def test_bound_without_samples():
    with pytest.raises(ValueError, match="gvm_variance_bound: budget must be 1 sample or more"):
        gvm_variance_bound(torch.ones(2), torch.ones(2), 0)
    assert gvm_variance_bound(torch.zeros(2), torch.ones(2), 3) == 0
