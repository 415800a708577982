"""Float64 truth for Gibbs weights and objectives: one trajectory at a time, plain bisection."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def softmax(s: Tensor, tau: float) -> Tensor:
    """softmax(tau * s) of one trajectory's supervised utilities [n]."""
    exponents = tau * (s.double() - s.double().max())
    return exponents.exp() / exponents.exp().sum()


def kl_to_uniform(q: Tensor) -> float:
    positive = q[q > 0].double()
    return float((positive * (positive * len(q)).log()).sum())


def supremum(s: Tensor) -> float:
    """What KL tends to as tau grows: log(n / multiplicity of the maximum)."""
    return math.log(len(s) / int((s == s.max()).sum()))


def bisect(kl, budget: float) -> float:
    """The tau with kl(tau) = budget, kl rising from 0: doubling, then halving."""
    low, high = 0.0, 1.0
    while kl(high) < budget:
        high *= 2
    while kl(high / 2) > budget:
        high /= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) <= budget else (low, middle)
    return (low + high) / 2


def tau_for_budget(trajectories: Sequence[Tensor], budget: float) -> float:
    """One tau for all trajectories, at which their mean KL is the budget.

    Utilities are brought to unit range for the search, so that any scale works.
    """
    scale = max(float(s.double().max() - s.double().min()) for s in trajectories)
    unit = [s.double() / scale for s in trajectories]
    mean = lambda t: sum(kl_to_uniform(softmax(s, t)) for s in unit) / len(unit)  # noqa: E731
    return bisect(mean, budget) / scale


def split(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The supervised values of each trajectory."""
    rows = values if values.dim() == 2 else values.unsqueeze(0)
    masks = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask.view_as(rows).bool()
    if cu_seqlens is None:
        return [row[chosen] for row, chosen in zip(rows, masks, strict=True)]
    ends = cu_seqlens.tolist()
    flat, flat_mask = rows.flatten(), masks.flatten()
    return [flat[a:b][flat_mask[a:b]] for a, b in pairwise(ends)]


def alpha(
    utilities: Sequence[Tensor],
    weights: Sequence[Tensor],
    mode: str,
    losses: Sequence[Tensor] | None = None,
) -> float | list[float]:
    """Uncapped variance control from each trajectory's supervised utilities s and weights q."""
    uniform = [s.double() / len(s) for s in utilities]
    weighted = [q.double() * s.double() for q, s in zip(weights, utilities, strict=True)]
    if mode == "utility":
        return math.sqrt(torch.cat(uniform).var() / torch.cat(weighted).var())
    if mode == "trajectory":
        over, under = (torch.stack([x.sum() for x in xs]).var() for xs in (uniform, weighted))
        return math.sqrt(over / under)
    if mode == "ess":
        return [math.sqrt(1 / (len(q) * float((q.double() ** 2).sum()))) for q in weights]
    if mode == "loss":
        assert losses is not None
        plain = sum(float(x.double().sum()) for x in losses)
        return plain / sum(
            len(q) * float((q.double() * x.double()).sum())
            for q, x in zip(weights, losses, strict=True)
        )
    return 1.0
