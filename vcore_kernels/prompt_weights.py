"""How much each response counts, so that its prompt counts as it should."""

import torch
from torch import Tensor

from vcore_kernels.segments import check_integers, check_mask, check_values
from vcore_kernels.spans import spanned

PROMPT_WEIGHTINGS = ("lemma1", "algorithm1", "token_mean")


@spanned
def prompt_weights(
    group: Tensor,
    weighting: str = "lemma1",
    *,
    counts: Tensor | None = None,
    accept_rate: Tensor | None = None,
    accepted: Tensor | None = None,
) -> Tensor:
    """``prompt_weight`` of :func:`raft_loss` and :func:`grpo_loss` for each response.

    ============== ================= ====================================== ======================
    weighting      weight            what the sum over responses estimates  aggregation with it
    ============== ================= ====================================== ======================
    ``lemma1``     1 / (n_i p_i)     sum over prompts of the mean accepted  ``seq-mean-token-sum``
                                     gradient, without bias for known p_i   over prompts
    ``algorithm1`` 1 / accepted of i the same where something was accepted, ``seq-mean-token-sum``
                                     0 for the other prompts: biased        over prompts
    ``token_mean`` 1                 an objective in which prompts count by ``token-mean``
                                     their accepted tokens
    ============== ================= ====================================== ======================

    For GRPO, ``algorithm1`` without ``accepted`` is the mean over prompts of the mean over their
    responses. Over prompts: with ``num_items`` the number of prompts of the optimizer step. Weights
    are made once for a step, not for each of its micro-batches.

    Args:
        group: [B], integer: the prompt of each response, an index into ``counts`` and
            ``accept_rate``.
        weighting: ``"lemma1"``, ``"algorithm1"`` or ``"token_mean"``.
        counts: [m], integer, for lemma1: n_i, the responses sampled for each prompt, rejected ones
            included.
        accept_rate: [m], floating, for lemma1: p_i in [0, 1], positive where a response was
            accepted.
        accepted: [B], bool: for algorithm1, which responses are. Others get weight 0. None: all of
            the batch.

    Returns:
        float64 [B] on the device of ``group``. Waits for the device.

    Raises:
        ValueError: unknown weighting, something missing, wrong shapes, group out of range, n or p
            of 0 for a response that was accepted. TypeError: wrong dtypes.

    Source: GVM (arXiv 2505.02391), lemma 1, algorithm 1, and its released trainer.
    """
    op = "prompt_weights"
    if weighting not in PROMPT_WEIGHTINGS:
        raise ValueError(
            f"{op}: weighting must be one of {', '.join(PROMPT_WEIGHTINGS)}, got {weighting!r}."
        )
    check_integers(op, "group", group)
    if group.dim() != 1:
        raise ValueError(f"{op}: group must be [B], got shape {list(group.shape)}.")
    accepted = check_mask(op, "accepted", accepted, group)
    if accepted is None:
        accepted = torch.ones_like(group, dtype=torch.bool)
    ones = accepted.to(torch.float64)
    if weighting == "token_mean":
        return ones
    if weighting == "algorithm1":
        _, index = group.unique(return_inverse=True)
        number = int(index.max()) + 1 if index.numel() else 0
        kept = ones.new_zeros(number).index_add(0, index, ones)
        return ones / kept[index].clamp(min=1)
    if counts is None or accept_rate is None:
        missing = "counts" if counts is None else "accept_rate"
        raise ValueError(f"{op}: 'lemma1' needs {missing}, one number for each prompt.")
    check_integers(op, "counts", counts)
    check_values(op, "accept_rate", accept_rate)
    if accept_rate.dim() != 1 or counts.shape != accept_rate.shape:
        raise ValueError(
            f"{op}: accept_rate has shape {list(accept_rate.shape)}, counts "
            f"{list(counts.shape)}, expected [m] for both."
        )
    if group.numel() and not 0 <= int(group.min()) <= int(group.max()) < counts.shape[0]:
        raise ValueError(
            f"{op}: group runs from {int(group.min())} to {int(group.max())}, but there are "
            f"{counts.shape[0]} prompts."
        )
    expected = (counts.to(torch.float64) * accept_rate.detach().to(torch.float64))[group]
    wrong = accepted & ~((expected > 0) & expected.isfinite())
    if wrong.any():
        at = int(group[wrong.nonzero()[0]])
        raise ValueError(
            f"{op}: prompt {at} has an accepted response, but counts {int(counts[at])} and "
            f"accept_rate {float(accept_rate[at])}. Pass the rate over all its samples."
        )
    return ones / expected.where(accepted, 1)
