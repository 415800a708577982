"""Correlations, areas under ROC curves and intervals, in float64."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of two vectors; NaN where one is constant or has fewer than 2 values."""
    x, y = _pair("pearson", x, y)
    x, y = x - x.mean(), y - y.mean()
    norms = x.norm() * y.norm()
    return float((x / x.norm()) @ (y / y.norm())) if norms > 0 else math.nan


def spearman(x: Tensor, y: Tensor) -> float:
    """Pearson correlation of the ranks, ties sharing the mean of theirs."""
    x, y = _pair("spearman", x, y)
    return pearson(ranks(x), ranks(y))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64; equal values share the mean of the ranks they take up."""
    return torch.from_numpy(stats.rankdata(values.numpy(force=True)))


def auroc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half.

    ``positive``: bool, like ``score``. NaN where one of the two classes is empty.
    """
    positive = positive.bool()
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return math.nan
    rank_sum = float(ranks(score.double())[positive].sum())
    return (rank_sum - count * (count + 1) / 2) / (count * others)


def within(
    statistic: Callable[[Tensor, Tensor], float],
    x: Tensor,
    y: Tensor,
    mask: Tensor,
    *,
    least: int = 3,
) -> Tensor:
    """``statistic`` of each trajectory on its own, float64 [at most B].

    ``x``, ``y``, ``mask``: [B, T], a trajectory a row. Rows with fewer than ``least`` tokens, and
    those where the statistic is not defined, are left out.
    """
    values = [
        statistic(row_x[row_mask], row_y[row_mask])
        for row_x, row_y, row_mask in zip(x, y, mask.bool(), strict=True)
        if int(row_mask.sum()) >= least
    ]
    return torch.tensor([v for v in values if not math.isnan(v)], dtype=torch.float64)


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half its width."""
        return (self.high - self.low) / 2

    def text(self, digits: int = 3) -> str:
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Mean of independent values (one a seed) and its t interval.

    One value has no interval: its bounds are NaN. No value, or one that is NaN: all NaN.
    """
    count = len(values)
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    x = torch.tensor(values, dtype=torch.float64)
    mean = float(x.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = (
        float(stats.t.ppf((1 + level) / 2, count - 1))
        * float(x.std(correction=1))
        / math.sqrt(count)
    )
    return Interval(mean, mean - half, mean + half, count)


def _pair(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(
            f"{name}: expected two vectors of one length, got {list(x.shape)} and {list(y.shape)}."
        )
    return x.double(), y.double()


def roc_curve(score: Tensor, positive: Tensor, points: int = 51) -> list[tuple[float, float]]:
    """(false, true) positive rates at ``points`` even false ones from 0 to 1.

    Between thresholds the curve is a straight line, where it is vertical its upper end counts.
    """
    positive = positive.bool()
    thresholds, group = torch.unique(-score.double(), sorted=True, return_inverse=True)
    steps = torch.zeros(2, len(thresholds) + 1, dtype=torch.float64)
    steps[0, 1:].index_add_(0, group, (~positive).double())
    steps[1, 1:].index_add_(0, group, positive.double())
    false, true = (row.cumsum(0) / row.sum() for row in steps)
    grid = torch.linspace(0, 1, points, dtype=torch.float64)
    right = torch.searchsorted(false, grid, right=True).clamp(1, len(false) - 1)
    low, high = false[right - 1], false[right]
    part = torch.where(high > low, (grid - low) / (high - low), 1.0)
    rates = true[right - 1] + part.clamp(0, 1) * (true[right] - true[right - 1])
    return list(zip(grid.tolist(), rates.tolist(), strict=True))
