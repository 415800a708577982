"""The VCORE objective: Gibbs-weighted token losses with variance control."""

from typing import NamedTuple

from torch import Tensor

from vcore_kernels._gibbs import gibbs_statistics, resolve_rule
from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_values, make_segments
from vcore_kernels.sft_loss import weighted_sum
from vcore_kernels.spans import spanned
from vcore_kernels.variance_control import (
    alpha_from_ess,
    alpha_from_loss,
    alpha_from_variance,
    check_mode,
)


class VcoreLoss(NamedTuple):
    """What :func:`vcore_loss` returns. Only ``loss`` carries a gradient."""

    loss: Tensor  # 0-dim
    weights: Tensor  # like nll: alpha*q*n, the factor on each token's loss; 0 where masked
    alpha: Tensor  # 0-dim; [S] under "ess"
    tau: Tensor  # [S]
    kl: Tensor  # [S] KL(q || uniform), nats
    ess: Tensor  # [S] effective sample size 1 / (n * sum q^2), in (0, 1]
    saturated: Tensor  # bool [S] kl_budget is more than these utilities can spend
    constant: Tensor  # bool [S] utilities equal, or as good as equal (noise floor)
    finite: Tensor  # bool [S] False where a supervised utility is NaN or infinite: uniform weights


@spanned
def vcore_loss(
    nll: Tensor,
    utility: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tau: float | None = None,
    temperature: float | None = None,
    kl_budget: float | None = None,
    kl_scope: str = "trajectory",
    variance_control: str = "utility",
    cap: float | None = 1.0,
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> VcoreLoss:
    """``alpha * sum_i sum_t q_t * n_i * nll_t / num_items`` with Gibbs weights q of the utilities.

    Weights and alpha carry no gradient. Constant utilities give weights of exactly 1 and then, with
    alpha = 1, the loss and the gradient of :func:`sft_loss` bit for bit. Weights, temperatures and
    variances come out of one operator.

    Args:
        nll: per-token losses in nats, [B, T], [T], or packed [N] or [1, N] with ``cu_seqlens``.
        utility: shaped like ``nll`` and aligned with it: utility t weights loss t.
        mask: shaped like ``nll``, bool or integer: the supervised tokens. None: all of them.
        cu_seqlens, tau, temperature, kl_budget, kl_scope: as for :func:`gibbs_weights`.
        variance_control, cap: mode and cap of alpha, as for :func:`variance_control`.
        num_items: as for :func:`sft_loss`.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Returns:
        :class:`VcoreLoss`; float32 for inputs of 32 bits or fewer, float64 for float64: loss,
        weights and alpha by the dtype of nll, tau, kl and ess by that of utility.

    Raises:
        ValueError, TypeError: as :func:`gibbs_weights`, :func:`variance_control` and
            :func:`sft_loss` do, in this function's name.

    Source: VCORE (arXiv 2510.27462).
    """
    op = "vcore_loss"
    rule, value = resolve_rule(op, tau, temperature, kl_budget, kl_scope)
    check_values(op, "nll", nll)
    check_values(op, "utility", utility, nll)
    segments = make_segments(op, utility, mask, cu_seqlens)
    check_mode(op, variance_control, cap, segments.number)
    stats = gibbs_statistics(op, utility, segments, rule, value, backend)

    weights = stats.weight.to(statistics_dtype(nll.dtype))
    if variance_control == "ess":
        alpha = alpha_from_ess(stats.ess, cap).to(weights.dtype)
        weights = weights * alpha[segments.segment_of()]
    else:
        if variance_control == "none":
            alpha = weights.new_ones(())
        elif variance_control == "loss":
            alpha = alpha_from_loss(nll.reshape(-1), weights, segments.mask, cap).to(weights.dtype)
        else:
            alpha = alpha_from_variance(stats.variance, variance_control, cap).to(weights.dtype)
        weights = weights * alpha
    weights = weights.view(nll.shape)
    mask = None if segments.mask is None else segments.mask.view(nll.shape)
    loss = weighted_sum(op, nll, weights, mask, num_items)
    return VcoreLoss(loss, weights, alpha, *stats[2:8])
