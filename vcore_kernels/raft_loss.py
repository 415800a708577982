"""RAFT and RAFT++: learning from the accepted responses alone."""

from torch import Tensor

from vcore_kernels._policy import (
    check_clip,
    check_responses,
    clipped_loss,
    old_logp_of,
    without_left_out,
)
from vcore_kernels.aggregation import aggregate, check_rows, find_aggregation
from vcore_kernels.spans import spanned


@spanned
def raft_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    reward: Tensor,
    *,
    mask: Tensor | None = None,
    prompt_weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    aggregation: str = "token-mean",
    max_length: int | None = None,
    num_items: int | Tensor | None = None,
) -> Tensor:
    """``max(-A r_t, -A clip(r_t, 1 - clip_low, 1 + clip_high))`` over tokens, A = max(0, reward).

    r_t = exp(logp_t - old_logp_t), exactly 1 on policy. Without ``old_logp`` vanilla RAFT,
    ``-A logp_t``. Each response's losses are multiplied by its ``prompt_weight``, then aggregated:

    ======================= ======================================================================
    token-mean, dapo        sum over tokens / supervised tokens
    seq-mean-token-sum      sum over tokens / responses that have a supervised token
    seq-mean-token-mean     sum over responses of their mean over tokens / such responses
    seq-mean-token-sum-norm sum over tokens / max_length (as in verl)
    dr-grpo                 sum over tokens / (B * max_length) (as in TRL)
    ======================= ======================================================================

    Rejected responses have no gradient but count in the denominators while they are in the batch.

    Args:
        logp: [B, T], any floating dtype, nats: ``-linear_nll(...)`` of the policy.
        old_logp: shaped like ``logp``: of the policy that sampled. None: vanilla RAFT.
        reward: [B], floating: 1 accepted, 0 rejected, or any reward.
        mask: [B, T], bool or integer: the response tokens. None: all of them.
        prompt_weight: [B], floating, as :func:`prompt_weights` makes it. None: 1.
        clip_low, clip_high: how far r may leave 1 before the gradient stops.
        max_length: tokens, for the two that divide by it; None: T. Micro-batches padded to
            different T only add up with one max_length.
        num_items: in place of the tokens, responses or rows that the aggregation counts, a number
            or a 0-dim tensor. Under gradient accumulation the count of the whole optimizer step
            (:func:`aggregation_items`). Less than 1 counts as 1.

    Returns:
        0-dim loss, float32 (float64 for float64), differentiable in ``logp`` alone. Masked tokens,
        rejected responses and those of weight 0 get no gradient, whatever they hold; with nothing
        left the loss is a zero that is connected to ``logp``.

    Raises:
        ValueError: wrong shapes, unknown aggregation, clips, max_length or num_items out of range.
        TypeError: wrong dtypes.

    Source: RAFT (arXiv 2304.06767), RAFT++ (arXiv 2504.11343), as GVM (arXiv 2505.02391) uses it.
    """
    op = "raft_loss"
    find_aggregation(op, aggregation, max_length)
    check_clip(op, clip_low, clip_high)
    new, mask = check_responses(op, logp, mask)
    advantage = check_rows(op, "reward", reward, new).clamp(min=0)
    used = mask & (advantage != 0).unsqueeze(1)
    new, used, advantage, prompt_weight = without_left_out(op, new, used, advantage, prompt_weight)
    if old_logp is None:
        losses = -advantage.unsqueeze(1) * new
    else:
        old = old_logp_of(op, old_logp, new, used)
        losses = clipped_loss(new - old, advantage, clip_low, clip_high)
    return aggregate(op, losses, mask, prompt_weight, aggregation, num_items, max_length)
