"""Advantages of responses over the others of their prompt."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_integers, check_values, segment_max, segment_sum
from vcore_kernels.spans import spanned

SCALES = ("group", "batch", "none")


class GroupMetrics(NamedTuple):
    """What :func:`group_metrics` returns, 0-dim int64 each."""

    groups: Tensor
    alone: Tensor  # of one response: nothing to compare with, advantage 0
    constant: Tensor  # of several responses with one reward: advantage 0


class _Groups(NamedTuple):
    values: Tensor  # float64 [B]
    member: Tensor  # int64 [B], 0 to S - 1
    size: Tensor  # int64 [S]
    constant: Tensor  # bool [S]


@spanned
def grpo_advantages(
    reward: Tensor, group: Tensor, *, scale: str = "group", eps: float = 1e-6
) -> Tensor:
    """``(reward - mean of its group) / (standard deviation + eps)``.

    Groups of one, and groups whose rewards are equal, have advantages of exactly 0;
    :func:`group_metrics` counts them.

    Args:
        reward: [B], floating, finite.
        group: [B], integer: which prompt a response belongs to; any numbers, in any order.
        scale: whose standard deviation: ``"group"``, ``"batch"`` (all rewards), or ``"none"``: no
            division. With n - 1 below the sum (ddof 1).
        eps: 0 or more.

    Returns:
        [B], float32 (float64 for float64), computed in float64. Waits for the device.

    Raises:
        ValueError: unknown scale, negative eps, wrong shapes, rewards that are not finite.
        TypeError: wrong dtypes.

    Source: GRPO (arXiv 2402.03300); ``"none"``: Dr. GRPO (arXiv 2503.20783).
    """
    op = "grpo_advantages"
    if scale not in SCALES:
        raise ValueError(f"{op}: scale must be 'group', 'batch' or 'none', got {scale!r}.")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}.")
    groups = _make_groups(op, reward, group)
    mean = segment_sum(groups.values, groups.member, groups.size.shape[0]) / groups.size
    deviation = (groups.values - mean[groups.member]).where(~groups.constant[groups.member], 0)
    if scale == "group":
        square = segment_sum(deviation.square(), groups.member, groups.size.shape[0])
        std = (square / (groups.size - 1).clamp(min=1)).sqrt()[groups.member]
    elif scale == "batch":
        around = groups.values - groups.values.sum() / max(reward.numel(), 1)
        std = (around.square().sum() / max(reward.numel() - 1, 1)).sqrt()
    else:
        std = torch.ones_like(deviation)
        eps = 0.0
    advantage = (deviation / (std + eps)).where(deviation != 0, 0)
    return advantage.to(statistics_dtype(reward.dtype))


@spanned
def group_metrics(reward: Tensor, group: Tensor) -> GroupMetrics:
    """How many groups there are, and how many of them teach nothing, for the metrics of a step.

    Args, errors: as for :func:`grpo_advantages`.
    """
    groups = _make_groups("group_metrics", reward, group)
    alone = groups.size == 1
    number = alone.sum().new_full((), alone.numel())
    return GroupMetrics(number, alone.sum(), (groups.constant & ~alone).sum())


def _make_groups(op: str, reward: Tensor, group: Tensor) -> _Groups:
    check_values(op, "reward", reward)
    if reward.dim() != 1:
        raise ValueError(f"{op}: reward must be [B], got shape {list(reward.shape)}.")
    check_integers(op, "group", group)
    if group.shape != reward.shape or group.device != reward.device:
        raise ValueError(
            f"{op}: group has shape {list(group.shape)} on {group.device}, expected "
            f"{list(reward.shape)} on {reward.device}: one prompt for each response."
        )
    values = reward.detach().to(torch.float64)
    if not values.isfinite().all():
        at = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"{op}: reward[{at}] is {float(values[at])}, expected finite rewards.")
    _, member, size = group.unique(return_inverse=True, return_counts=True)
    highest = segment_max(values, member, size.shape[0])
    lowest = -segment_max(-values, member, size.shape[0])
    return _Groups(values, member, size, highest == lowest)
