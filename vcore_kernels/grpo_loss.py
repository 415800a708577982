"""GRPO: the clipped policy objective over group-relative advantages."""

import math

import torch
from torch import Tensor

from vcore_kernels._policy import (
    check_clip,
    check_responses,
    clipped_loss,
    exponent_ceiling,
    old_logp_of,
    without_left_out,
)
from vcore_kernels.aggregation import aggregate, check_rows, find_aggregation
from vcore_kernels.segments import check_values
from vcore_kernels.spans import spanned


@spanned
def grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantage: Tensor,
    *,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_clamp: float | None = None,
    aggregation: str = "token-mean",
    mask: Tensor | None = None,
    prompt_weight: Tensor | None = None,
    max_length: int | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """``max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high)) + beta * kl_t`` over tokens.

    r_t = exp(logp_t - old_logp_t), exactly 1 on policy. With ``dual_clip`` c the first term is at
    most ``-A c`` where A < 0. kl_t = exp(d) - d - 1 with d = ref_logp_t - logp_t, the k3 estimate.
    Aggregated as in :func:`raft_loss`.

    Args:
        logp: [B, T], any floating dtype, nats: ``-linear_nll(...)`` of the policy.
        old_logp: shaped like ``logp``: of the policy that sampled. None: on policy, r = 1.
        advantage: [B], floating: :func:`grpo_advantages`.
        ref_logp: shaped like ``logp``, of the reference; needed where beta is not 0.
        beta: weight of the KL term, nats^-1.
        clip_low, clip_high: how far r may leave 1 before the gradient stops.
        dual_clip: more than 1 (3 is usual); None: a ratio may grow without bound where A < 0.
        kl_clamp: the largest kl_t, nats (10 is usual); beyond it no gradient. None: no bound.
        mask, prompt_weight, aggregation, max_length, num_items: as for :func:`raft_loss`;
            ``prompt_weight`` multiplies both terms.

    Returns:
        0-dim loss, float32 (float64 for float64), differentiable in ``logp`` alone. Masked tokens
        and responses of weight 0 get no gradient, whatever they hold; nor do, with beta 0, those of
        advantage 0. With nothing left the loss is a zero that is connected to ``logp``.
        Exponentials stop at the square root of the largest number, where the gradient is 0.

    Raises:
        ValueError: wrong shapes, unknown aggregation, options out of range, beta without ref_logp.
        TypeError: wrong dtypes.

    Source: GRPO (arXiv 2402.03300); dual clip: arXiv 1912.09729; asymmetric clip: DAPO (arXiv
    2503.14476); Dr. GRPO (arXiv 2503.20783).
    """
    op = "grpo_loss"
    find_aggregation(op, aggregation, max_length)
    check_clip(op, clip_low, clip_high, dual_clip)
    if not 0 <= beta < math.inf:
        raise ValueError(f"{op}: beta must be finite and not negative, got {beta}.")
    if kl_clamp is not None and not kl_clamp > 0:
        raise ValueError(f"{op}: kl_clamp must be positive, got {kl_clamp}.")
    if ref_logp is not None:
        check_values(op, "ref_logp", ref_logp, logp)
    elif beta > 0:
        raise ValueError(f"{op}: beta is {beta}. Pass ref_logp, shaped like logp.")
    new, mask = check_responses(op, logp, mask)
    advantage = check_rows(op, "advantage", advantage, new)
    used = mask if beta > 0 else mask & (advantage != 0).unsqueeze(1)
    new, used, advantage, prompt_weight = without_left_out(op, new, used, advantage, prompt_weight)
    old = new.detach() if old_logp is None else old_logp_of(op, old_logp, new, used)
    losses = clipped_loss(new - old, advantage, clip_low, clip_high, dual_clip)
    if ref_logp is not None and beta > 0:
        reference = ref_logp.detach().to(new.dtype).where(used, 0)
        losses = losses + beta * _k3(reference - new, kl_clamp)
    return aggregate(op, losses, mask, prompt_weight, aggregation, num_items, max_length)


def _k3(d: Tensor, most: float | None) -> Tensor:
    """``exp(d) - d - 1``, at most ``most``."""
    kl = torch.expm1(d.clamp(max=exponent_ceiling(d.dtype))) - d
    return kl if most is None else kl.clamp(max=most)
