"""What the policy objectives share: checked responses, and the clipped ratio."""

import math

import torch
from torch import Tensor

from vcore_kernels.aggregation import check_rows
from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_mask, check_values


def check_responses(op: str, logp: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] in float32 or float64, and bool [B, T]."""
    check_values(op, "logp", logp)
    if logp.dim() != 2:
        raise ValueError(
            f"{op}: logp must be [B, T], one row a response, got shape {list(logp.shape)}."
        )
    mask = check_mask(op, "mask", mask, logp)
    if mask is None:
        mask = torch.ones_like(logp, dtype=torch.bool)
    return logp.to(statistics_dtype(logp.dtype)), mask


def old_logp_of(op: str, old_logp: Tensor, new: Tensor, used: Tensor) -> Tensor:
    """``old_logp`` without a graph in the dtype of ``new``, 0 where not used."""
    check_values(op, "old_logp", old_logp, new)
    return old_logp.detach().to(new.dtype).where(used, 0)


def without_left_out(
    op: str, new: Tensor, used: Tensor, advantage: Tensor, prompt_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``new`` and ``used`` [B, T], advantage and prompt weight [B] without responses of weight 0.

    What no used token reads becomes 0, whatever it was.
    """
    if prompt_weight is not None:
        prompt_weight = check_rows(op, "prompt_weight", prompt_weight, new)
        used = used & (prompt_weight != 0).unsqueeze(1)
        prompt_weight = prompt_weight.where(used.any(1), 0)
    return new.where(used, 0), used, advantage.where(used.any(1), 0), prompt_weight


def check_clip(op: str, clip_low: float, clip_high: float, dual_clip: float | None = None) -> None:
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{op}: {name} must be 0 or more, got {value}.")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"{op}: dual_clip must be more than 1, got {dual_clip}.")


def clipped_loss(
    log_ratio: Tensor,  # [B, T]
    advantage: Tensor,  # [B]
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """``max(-A r, -A clip(r, 1 - low, 1 + high))``, where A < 0 at most ``-A dual_clip``: [B, T].

    For A >= 0 that is -A min(r, 1 + high), for A < 0 it is -A min(max(r, 1 - low), dual_clip): one
    clamp of the log-ratio, taken before the exponential, so that nothing overflows where the clip
    holds. Where no clip holds, ratios stop at the square root of the largest number.
    """
    ceiling = exponent_ceiling(log_ratio.dtype)
    floor = math.log1p(-clip_low) if clip_low < 1 else -math.inf
    above = min(math.log1p(clip_high), ceiling)
    dual = ceiling if dual_clip is None else min(math.log(dual_clip), ceiling)
    advantage = advantage.unsqueeze(1)
    lowest = torch.full_like(advantage, floor).where(advantage < 0, -math.inf)
    highest = torch.full_like(advantage, dual).where(advantage < 0, above)
    return -advantage * log_ratio.clamp(min=lowest, max=highest).exp()


def exponent_ceiling(dtype: torch.dtype) -> float:
    """The largest exponent taken: its exponential squared is still finite."""
    return math.log(torch.finfo(dtype).max) / 2
