"""Samples in whole numbers: checks and rounding that every allocation rule shares."""

import operator

import torch
from torch import Tensor

LARGEST_BUDGET = 2**40  # beyond it a float64 share no longer says which way a count rounds
_GRID = 2.0**36


class NothingToAllocateError(ValueError):
    """No prompt is left that an allocation rule would give a sample to."""


def apportion(weight: Tensor, budget: int) -> Tensor:
    """``budget`` samples in proportion to ``weight``: int64 [m], summing to ``budget`` exactly.

    Round half to even, then mend the sum by ones on the largest residuals, the earlier prompt
    first among equals. Each count is within 1 of its quota; a weight of 0 gets nothing. Quotas are
    taken to 2^-36 of a sample, so that ties stay ties whatever the scale of the weights.

    Args:
        weight: float64 [m], finite, not negative, not all 0.
        budget: 0 to ``LARGEST_BUDGET``.
    """
    share = weight / weight.max()
    quota = share / share.sum() * budget
    quota = (quota * _GRID).round() / _GRID
    counts = quota.round()
    missing = budget - int(counts.sum())
    # Quotas sum to the budget and no residual is beyond 1/2: at least 2*|missing| have its sign.
    step = 1 if missing >= 0 else -1
    counts[_largest(step * (quota - counts), abs(missing))] += step
    return counts.to(torch.int64)


def _largest(values: Tensor, number: int) -> Tensor:
    """Where the largest are, the earlier among equals: bool [m]. Cheaper than a stable sort."""
    if number == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    edge = values.kthvalue(values.numel() - number + 1).values
    chosen = values > edge
    level = (values == edge).nonzero().squeeze(1)
    chosen[level[: number - int(chosen.sum())]] = True
    return chosen


def check_budget(op: str, budget: int) -> int:
    try:
        budget = operator.index(budget)
    except TypeError:
        raise TypeError(
            f"{op}: budget must be a whole number of samples, got {budget!r}."
        ) from None
    if not 0 <= budget <= LARGEST_BUDGET:
        raise ValueError(f"{op}: budget must be 0 to 2^40 samples, got {budget}.")
    return budget


def check_prompts(op: str, name: str, values: Tensor, prompts: int | None = None) -> Tensor:
    """``values`` as float64 [m] on the host: one finite number of 0 or more for each prompt."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind}.")
    if values.dim() != 1 or (prompts is not None and values.shape[0] != prompts):
        expected = "[m]" if prompts is None else f"[{prompts}]"
        raise ValueError(
            f"{op}: {name} has shape {list(values.shape)}, expected {expected}: "
            "one number for each prompt."
        )
    values = values.detach().to(device="cpu", dtype=torch.float64)
    _refuse(op, name, values, ~(values >= 0) | values.isinf(), "finite and not negative")
    return values


def check_rates(op: str, name: str, values: Tensor, prompts: int | None = None) -> Tensor:
    """As :func:`check_prompts`, between 0 and 1; beyond 1 by a sum's rounding counts as 1."""
    values = check_prompts(op, name, values, prompts)
    _refuse(op, name, values, values > 1 + 1e-6, "between 0 and 1 (accepted / sampled)")
    return values.clamp(max=1)


def _refuse(op: str, name: str, values: Tensor, wrong: Tensor, expected: str) -> None:
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: {name}[{at}] is {float(values[at])}, expected {expected}.")
