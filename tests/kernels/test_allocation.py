import itertools
import math

import pytest
import torch
from test_gvm_allocate import allocations

from vcore_kernels import ALLOCATION_RULES, NothingToAllocateError, allocate, gvm_allocate
from vcore_kernels import allocation as module

RATES = torch.tensor([0.0, 0.125, 0.5, 0.125, 1.0, 0.875, 0.3], dtype=torch.float64)
NORMS = torch.tensor([0.0, 3.0, 1.0, 2.0, 1.0, 5.0, 2.0])
ONE_SHOT = sorted(set(ALLOCATION_RULES) - {"reinforce_ada"})


def knapsack_value(p, n):
    return 0.0 if n == 0 else (1 - p**n - (1 - p) ** n) * p * (1 - p) ** 2


@pytest.mark.parametrize("rule", ONE_SHOT)
@pytest.mark.parametrize("budget", [0, 1, 5, 40])
def test_rules_that_decide_at_once(rule, budget):
    counts = allocate(rule, budget, accept_rate=RATES, grad_norm=NORMS)
    assert counts.dtype == torch.int64
    assert bool((counts >= 0).all())
    assert int(counts.sum()) == budget
    if rule != "uniform":
        assert counts[0] == 0
    if rule in ("neyman", "knapsack"):
        assert counts[4] == 0


def test_gvm_takes_its_options():
    options = {"alpha": 0.01, "beta": 3.0, "max_accept_rate": 0.9, "min_expected_accepts": 0.2}
    counts = allocate("gvm", 33, accept_rate=RATES, grad_norm=NORMS, **options)
    assert torch.equal(counts, gvm_allocate(NORMS, RATES, 33, **options))
    assert not torch.equal(counts, allocate("gvm", 33, accept_rate=RATES, grad_norm=NORMS))


def test_uniform_and_neyman():
    assert allocate("uniform", 8, prompts=5).tolist() == [1, 1, 2, 2, 2]
    assert allocate("uniform", 2, prompts=5).tolist() == [1, 1, 0, 0, 0]
    rates = torch.tensor([0.5, 0.1, 0.9, 0.0, 1.0])
    assert allocate("neyman", 11, accept_rate=rates).tolist() == [5, 3, 3, 0, 0]


@pytest.mark.parametrize(
    "rates",
    [[0.5, 0.5, 0.5], [0.125, 0.125, 0.9, 0.9], [0.01, 0.02, 0.99], [0.3, 0.0, 0.7, 1.0]],
)
@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 9])
def test_knapsack_is_the_brute_force_maximum(rates, budget):
    counts = allocate("knapsack", budget, accept_rate=torch.tensor(rates, dtype=torch.float64))

    def value(n):
        return sum(map(knapsack_value, rates, n))

    best = max(map(value, allocations(budget, len(rates))))
    assert value(counts.tolist()) == pytest.approx(best, rel=1e-12, abs=1e-15)
    assert int(counts.sum()) == budget


def test_knapsack_against_a_plain_dynamic_program():
    generator = torch.Generator().manual_seed(0)
    rates = (torch.randint(1, 8, (15,), generator=generator) / 8).double()
    budget = 50
    best = [0.0] + [-math.inf] * budget
    for p in rates.tolist():
        values = [knapsack_value(p, n) for n in range(budget + 1)]
        best = [max(best[b - n] + values[n] for n in range(b + 1)) for b in range(budget + 1)]
    counts = allocate("knapsack", budget, accept_rate=rates)
    value = sum(map(knapsack_value, rates.tolist(), counts.tolist()))
    assert value == pytest.approx(best[budget], rel=1e-12)
    assert not (counts == 1).any()  # one sample cannot hold both outcomes


@pytest.mark.parametrize("rule", ["neyman", "knapsack", "gvm"])
def test_nothing_to_learn(rule):
    settled = torch.tensor([0.0, 0.0]) if rule == "gvm" else torch.tensor([0.0, 1.0])
    with pytest.raises(NothingToAllocateError, match=r"8 samples: (each )?of 2 prompts"):
        allocate(rule, 8, accept_rate=settled, grad_norm=torch.ones(2))


def rounds(rule, budget, outcome, **known):
    """The loop of the docstring; ``outcome(i)`` says what the next sample of prompt i is."""
    m = known.get("prompts") or len(known["accept_rate"])
    sampled = accepted = torch.zeros(m, dtype=torch.int64)
    log = []
    while (counts := allocate(rule, budget, sampled=sampled, accepted=accepted, **known)).any():
        good = [sum(outcome(i) for _ in range(n)) for i, n in enumerate(counts.tolist())]
        sampled, accepted = sampled + counts, accepted + torch.tensor(good)
        log.append(counts.tolist())
    return sampled.tolist(), accepted.tolist(), log


def test_reinforce_ada_retires_what_has_both_outcomes():
    turns = [itertools.cycle(pattern) for pattern in ([1, 0], [1, 1, 1, 0], [0])]
    known = {"prompts": 3, "round_size": 4, "enough": 2}
    sampled, accepted, log = rounds("reinforce_ada", 30, lambda i: next(turns[i]), **known)
    assert log[:3] == [[4, 4, 4], [0, 4, 4], [0, 0, 4]]
    assert sampled == [4, 8, 18]  # the last one takes what the budget leaves
    assert accepted == [2, 6, 0]
    assert log[-1] == [0, 0, 2]

    turns = [itertools.cycle(pattern) for pattern in ([1, 0], [1, 1, 1, 0], [0])]
    sampled, _, _ = rounds("reinforce_ada", 30, lambda i: next(turns[i]), max_samples=10, **known)
    assert sampled == [4, 8, 10]


def test_the_last_round_is_shared():
    counts = allocate("reinforce_ada", 7, prompts=3, round_size=4)
    assert counts.tolist() == [3, 2, 2]


@pytest.mark.parametrize("rule", ONE_SHOT)
def test_what_has_not_come_is_asked_for_again(rule):
    known = {"accept_rate": RATES, "grad_norm": NORMS}
    wanted = allocate(rule, 40, **known)
    came = wanted - (wanted > 2).long()
    again = allocate(rule, 40, sampled=came, **known)
    assert torch.equal(came + again, wanted)
    assert not allocate(rule, 40, sampled=wanted, **known).any()


def test_a_first_stage_counts_toward_the_budget():
    first = torch.full((7,), 4)
    counts = allocate("gvm", 60, accept_rate=RATES, grad_norm=NORMS, sampled=first)
    assert int(counts.sum()) == 60 - 28
    assert not counts[RATES == 0].any()


def test_a_new_rule_is_a_function_and_a_line(monkeypatch):
    def hardest_first(known, budget, *, share=1.0):
        return module.apportion((1 - known.accept_rate) * share, budget)

    monkeypatch.setitem(ALLOCATION_RULES, "hardest_first", hardest_first)
    rates = torch.tensor([1.0, 0.5, 0.0])
    assert allocate("hardest_first", 6, accept_rate=rates, share=2.0).tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("rule", "known", "error", "message"),
    [
        ("greedy", {"prompts": 2}, ValueError, "rule must be one of uniform, gvm"),
        ("uniform", {}, ValueError, "how many prompts"),
        ("uniform", {"prompts": 0}, NothingToAllocateError, "there are no prompts"),
        ("uniform", {"prompts": 2, "round_size": 3}, ValueError, "'round_size'; it has none"),
        ("gvm", {"prompts": 2, "enough": 3}, ValueError, "no option 'enough'; it has alpha, beta"),
        ("gvm", {"accept_rate": torch.ones(2)}, ValueError, "needs grad_norm"),
        ("gvm", {"grad_norm": torch.ones(2)}, ValueError, "needs accept_rate"),
        ("neyman", {"prompts": 2}, ValueError, "needs accept_rate"),
        ("neyman", {"prompts": 3, "accept_rate": torch.ones(2)}, ValueError, r"expected \[3\]"),
        ("uniform", {"sampled": torch.ones(2)}, TypeError, "sampled must be an integer tensor"),
        ("uniform", {"sampled": torch.tensor([-1])}, ValueError, r"sampled\[0\] is -1"),
        ("uniform", {"accepted": torch.tensor([0, 2])}, ValueError, r"accepted\[1\] is 2 of 0"),
        ("uniform", {"prompts": 3, "accepted": torch.tensor([0])}, ValueError, r"shape \[1\]"),
    ],
)  # fmt: skip
def test_bad_arguments(rule, known, error, message):
    with pytest.raises(error, match=f"allocate: .*{message}"):
        allocate(rule, 8, **known)


def test_a_huge_round_keeps_to_the_budget():
    for option in ("round_size", "max_samples"):
        counts = allocate("reinforce_ada", 10, prompts=3, **{option: 2**62})
        assert int(counts.sum()) == 10


@pytest.mark.parametrize("option", ["round_size", "enough", "max_samples"])
@pytest.mark.parametrize("value", [1.5, "2", True])
def test_reinforce_ada_takes_whole_numbers(option, value):
    with pytest.raises(TypeError, match=f"reinforce_ada: {option} must be a whole number"):
        allocate("reinforce_ada", 8, prompts=2, **{option: value})


@pytest.mark.parametrize("option", ["alpha", "beta"])
def test_gvm_takes_numbers(option):
    with pytest.raises(TypeError, match=f"gvm_allocate: {option} must be a number, got 'x'"):
        allocate("gvm", 8, accept_rate=RATES, grad_norm=NORMS, **{option: "x"})


@pytest.mark.parametrize("option", ["round_size", "enough", "max_samples"])
def test_reinforce_ada_checks_its_options(option):
    with pytest.raises(ValueError, match=f"reinforce_ada: {option} must be 1 or more, got 0"):
        allocate("reinforce_ada", 8, prompts=2, **{option: 0})
