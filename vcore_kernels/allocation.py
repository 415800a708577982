"""Rules that distribute a budget of samples over prompts, one-shot and sequential, in one table."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vcore_kernels._apportion import (
    LARGEST_BUDGET,
    NothingToAllocateError,
    apportion,
    check_budget,
    check_prompts,
    check_rates,
)
from vcore_kernels.gvm_allocate import gvm_allocate
from vcore_kernels.segments import check_integers
from vcore_kernels.spans import spanned


class Evidence(NamedTuple):
    """What a rule may know of m prompts: checked, on the host."""

    accept_rate: Tensor | None  # float64 [m]
    grad_norm: Tensor | None  # float64 [m]
    sampled: Tensor  # int64 [m] so far, in this allocation
    accepted: Tensor  # int64 [m] of them


def uniform(known: Evidence, budget: int) -> Tensor:
    """The same number for each prompt, give or take one."""
    return apportion(torch.ones(known.sampled.shape[0], dtype=torch.float64), budget)


def neyman(known: Evidence, budget: int) -> Tensor:
    """In proportion to the standard deviation of the reward, sqrt(p (1 - p))."""
    p = _rates("neyman", known)
    return apportion(_not_settled("neyman", (p * (1 - p)).sqrt(), budget), budget)


def knapsack(known: Evidence, budget: int) -> Tensor:
    """The most of ``sum (1 - p^n - (1-p)^n) p (1-p)^2``, the value 0 at n = 0: exactly.

    1 - p^n - (1-p)^n is the chance that n samples hold both outcomes, p (1-p)^2 what they are then
    worth. The value is concave from n = 1 on, though not from 0, so that among prompts of one rate
    those that are sampled share evenly. A dynamic program over the *different* rates, of which a
    first stage of N' samples leaves at most N' - 1, each step vectorised over the budget: time
    O(m N + d N^2), memory O(d N), for m prompts, d rates, N samples. Among equals the earlier
    prompt gets more.

    Source: Knapsack RL (arXiv 2509.25849).
    """
    p = _rates("knapsack", known)
    worth = _not_settled("knapsack", p * (1 - p).square(), budget)
    rates, kind = p.where(worth > 0, 0).unique(return_inverse=True)
    members = [(kind == i).nonzero().squeeze(1) for i in range(len(rates)) if rates[i] > 0]
    plans = [_even_shares(float(p[group[0]]), len(group), budget) for group in members]

    best = [plans[0][0]]  # by how many rates: the value of exactly b samples on the first of them
    scratch = torch.empty(budget + 1, dtype=torch.float64)
    for value, _ in plans[1:]:
        reached = best[-1] + value[0]
        for b in range(1, budget + 1):
            candidate = torch.add(best[-1][: budget + 1 - b], value[b], out=scratch[b:])
            torch.maximum(reached[b:], candidate, out=reached[b:])
        best.append(reached)

    counts = torch.zeros(p.shape[0], dtype=torch.int64)
    left = budget
    for i in reversed(range(len(members))):
        value, prompts = plans[i]
        before = best[i - 1][: left + 1].flip(0) if i else None
        share = left if before is None else int((before + value[: left + 1]).argmax())
        among = int(prompts[share])
        counts[members[i][:among]] = share // among
        counts[members[i][: share % among]] += 1
        left -= share
    return counts


def _even_shares(p: float, prompts: int, budget: int) -> tuple[Tensor, Tensor]:
    """For 0..budget samples on prompts of one rate: the most value, and how many prompts share."""
    n = torch.arange(budget + 2, dtype=torch.float64)
    value = (1 - p**n - (1 - p) ** n) * (p * (1 - p) ** 2)
    value[:2] = 0
    samples = torch.arange(budget + 1)
    best = value[:-1].clone()
    funded = torch.ones_like(samples)
    for k in range(2, min(prompts, budget) + 1):
        each, more = samples // k, samples % k
        shared = (k - more) * value[each] + more * value[each + 1]
        better = shared > best
        best, funded = best.maximum(shared), funded.where(~better, k)
    return best, funded


def reinforce_ada(
    known: Evidence,
    budget: int,
    *,
    round_size: int = 4,
    enough: int = 2,
    max_samples: int | None = None,
) -> Tensor:
    """``round_size`` more for each prompt that has not ``enough`` of both outcomes yet.

    A prompt retires with ``enough`` accepted and as many rejected responses, or after
    ``max_samples`` (None: the budget alone ends it). The last round shares what the budget leaves.
    Nothing is asked for once all have retired, whatever is left.

    Source: Reinforce-Ada (arXiv 2510.04996), the sequential, balanced variant.
    """
    options = {"round_size": round_size, "enough": enough}
    if max_samples is not None:
        options["max_samples"] = max_samples
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"reinforce_ada: {name} must be a whole number, got {value!r}.")
        if value < 1:
            raise ValueError(f"reinforce_ada: {name} must be 1 or more, got {value}.")
    rejected = known.sampled - known.accepted
    active = (known.accepted < enough) | (rejected < enough)
    total = known.sampled + min(round_size, budget) * active
    return total if max_samples is None else total.clamp(max=min(max_samples, LARGEST_BUDGET))


def gvm(known: Evidence, budget: int, **options) -> Tensor:
    """:func:`gvm_allocate`, with its options."""
    if known.grad_norm is None:
        raise ValueError("allocate: rule 'gvm' needs grad_norm, one number for each prompt.")
    return gvm_allocate(known.grad_norm, _rates("gvm", known), budget, **options)


RULES_BY_RATE = ("gvm", "neyman", "knapsack")  # those that need accept_rate
# A rule says how many samples, those so far included, each prompt should have after the next round.
ALLOCATION_RULES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "gvm": gvm,
    "neyman": neyman,
    "knapsack": knapsack,
    "reinforce_ada": reinforce_ada,
}


@spanned
def allocate(
    rule: str,
    budget: int,
    *,
    prompts: int | None = None,
    accept_rate: Tensor | None = None,
    grad_norm: Tensor | None = None,
    sampled: Tensor | None = None,
    accepted: Tensor | None = None,
    **options,
) -> Tensor:
    """How many responses to sample for each prompt in the next round, by a rule of the table.

    One loop serves rules that decide at once and rules that watch what comes::

        sampled = accepted = torch.zeros(m, dtype=torch.int64)
        while (counts := allocate(rule, budget, sampled=sampled, accepted=accepted, **known)).any():
            drawn, good = sample_and_verify(counts)
            sampled, accepted = sampled + drawn, accepted + good

    A pure function of what has been seen, so that a run that was interrupted goes on where it was.
    A rule that decides at once asks for everything in the first round and later for what has not
    come. A first stage counts toward the budget if its samples are passed as ``sampled``.

    Args:
        rule: ``"uniform"``, ``"gvm"``, ``"neyman"``, ``"knapsack"``, ``"reinforce_ada"``; another
            is one function ``(Evidence, budget, **options) -> total`` and a line in
            ``ALLOCATION_RULES``.
        budget: samples over all rounds.
        prompts: m, where no tensor says it.
        accept_rate, grad_norm: [m], as for :func:`gvm_allocate`; the same in every round.
            gvm, neyman and knapsack need accept_rate, gvm grad_norm as well.
        sampled, accepted: int64 [m], samples so far and how many of them were accepted; None: none.
        options: those of the rule.

    Returns:
        int64 [m] on the host, not negative, ``sampled + counts`` summing to no more than
        ``budget``. All 0: done.

    Raises:
        NothingToAllocateError: a ValueError, where the rule has no use for any sample.
        ValueError: unknown rule or option, something missing, wrong shapes or values.
        TypeError: wrong dtypes.
    """
    op = "allocate"
    if rule not in ALLOCATION_RULES:
        raise ValueError(f"{op}: rule must be one of {', '.join(ALLOCATION_RULES)}, got {rule!r}.")
    decide = ALLOCATION_RULES[rule]
    _check_options(decide, rule, options)
    budget = check_budget(op, budget)
    known = _evidence(op, prompts, accept_rate, grad_norm, sampled, accepted)
    left = budget - int(known.sampled.sum())
    if left <= 0:
        return torch.zeros_like(known.sampled)
    wanted = (decide(known, budget, **options) - known.sampled).clamp(min=0)
    if int(wanted.sum()) > left:
        wanted = apportion(wanted.to(torch.float64), left)
    return wanted


def _check_options(decide: Callable[..., Tensor], rule: str, options: dict[str, object]) -> None:
    taken = gvm_allocate if decide is gvm else decide
    parameters = inspect.signature(taken).parameters.values()
    names = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
    for name in options:
        if name not in names:
            known = f"has {', '.join(names)}" if names else "has none"
            raise ValueError(f"allocate: rule {rule!r} has no option {name!r}; it {known}.")


def _evidence(
    op: str,
    prompts: int | None,
    accept_rate: Tensor | None,
    grad_norm: Tensor | None,
    sampled: Tensor | None,
    accepted: Tensor | None,
) -> Evidence:
    given = [x for x in (accept_rate, grad_norm, sampled, accepted) if isinstance(x, Tensor)]
    if prompts is None:
        if not given:
            raise ValueError(f"{op}: how many prompts? Pass prompts, or a tensor of [m].")
        prompts = given[0].numel()
    if accept_rate is not None:
        accept_rate = check_rates(op, "accept_rate", accept_rate, prompts)
    if grad_norm is not None:
        grad_norm = check_prompts(op, "grad_norm", grad_norm, prompts)
    if prompts < 1:
        raise NothingToAllocateError(f"{op}: there are no prompts.")
    sampled = _check_counts(op, "sampled", sampled, prompts)
    accepted = _check_counts(op, "accepted", accepted, prompts)
    if (accepted > sampled).any():
        at = int((accepted > sampled).nonzero()[0])
        raise ValueError(
            f"{op}: accepted[{at}] is {int(accepted[at])} of {int(sampled[at])} sampled."
        )
    return Evidence(accept_rate, grad_norm, sampled, accepted)


def _check_counts(op: str, name: str, counts: Tensor | None, prompts: int) -> Tensor:
    if counts is None:
        return torch.zeros(prompts, dtype=torch.int64)
    check_integers(op, name, counts)
    if counts.shape != (prompts,):
        raise ValueError(f"{op}: {name} has shape {list(counts.shape)}, expected [{prompts}].")
    counts = counts.to(device="cpu", dtype=torch.int64)
    if (counts < 0).any():
        at = int((counts < 0).nonzero()[0])
        raise ValueError(f"{op}: {name}[{at}] is {int(counts[at])}, expected 0 or more.")
    return counts


def _rates(rule: str, known: Evidence) -> Tensor:
    if known.accept_rate is None:
        raise ValueError(f"allocate: rule {rule!r} needs accept_rate, one for each prompt.")
    return known.accept_rate


def _not_settled(rule: str, weight: Tensor, budget: int) -> Tensor:
    if weight.any():
        return weight
    raise NothingToAllocateError(
        f"allocate: rule {rule!r} has no use for {budget} samples: each of {weight.numel()} "
        "prompts has accept_rate 0 or 1. Sample more responses, or prompts of another difficulty."
    )
