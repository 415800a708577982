"""Importance-weighted supervised fine-tuning against a reference policy."""

import math

from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_values, make_segments, segment_sum
from vcore_kernels.sft_loss import weighted_sum
from vcore_kernels.spans import spanned

CLIP = {"sequence": (0.0, 16.0), "token": (0.2, 1.8)}


@spanned
def iw_sft_loss(
    nll: Tensor,
    ref_logp: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    level: str = "sequence",
    temp: float = 1.0,
    clip: tuple[float, float] | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """``sum w * nll_t / num_items`` with importance weights w of the policy over a reference.

    ``level="sequence"``: one weight for each trajectory, clip(exp(temp * mean_t(logp_t -
    ref_logp_t))), the mean over its supervised tokens. ``level="token"``: clip(exp(temp * (logp_t -
    ref_logp_t))). With the reference equal to the policy it is :func:`sft_loss`, bit for bit. w
    carries no gradient.

    Args:
        nll: [B, T], [T], or packed [N] or [1, N] with ``cu_seqlens``: -logp of the policy, nats.
        ref_logp: shaped like ``nll``: log-probabilities (not losses) of the same tokens under the
            reference.
        mask, cu_seqlens: as for :func:`gibbs_weights`.
        clip: (lowest, highest) weight; None for (0, 16) over sequences, (0.2, 1.8) over tokens.
        num_items: as for :func:`sft_loss`.

    Returns:
        0-dim loss, float32 (float64 for float64), differentiable in ``nll`` alone.

    Raises:
        ValueError: unknown level, clip not rising from 0 or more, temp not finite, wrong shapes.
        TypeError: wrong dtypes.

    Source: iw-SFT (arXiv 2507.12856).
    """
    op = "iw_sft_loss"
    if level not in CLIP:
        raise ValueError(f"{op}: level must be 'sequence' or 'token', got {level!r}.")
    lowest, highest = CLIP[level] if clip is None else clip
    if not 0 <= lowest <= highest:
        raise ValueError(
            f"{op}: clip must be (lowest, highest) with 0 <= lowest <= highest, got {clip}."
        )
    if not math.isfinite(temp):
        raise ValueError(f"{op}: temp must be finite, got {temp}.")
    check_values(op, "nll", nll)
    check_values(op, "ref_logp", ref_logp, nll)
    segments = make_segments(op, nll, mask, cu_seqlens)

    dtype = statistics_dtype(nll.dtype)
    log_ratio = (-nll.detach().to(dtype) - ref_logp.detach().to(dtype)).reshape(-1)
    if level == "sequence":
        index, valid = segments.segment_of(), segments.valid()
        count = segment_sum(valid.to(dtype), index, segments.number)
        total = segment_sum(log_ratio.where(valid, 0), index, segments.number)
        log_ratio = (total / count.clamp(min=1))[index]
    weights = (temp * log_ratio).exp().clamp(lowest, highest).view(nll.shape)
    mask = None if segments.mask is None else segments.mask.view(nll.shape)
    return weighted_sum(op, nll, weights, mask, num_items)
