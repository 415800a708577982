"""The factor that brings the variance of a reweighted update back to that of the uniform one."""

import math

import torch
from torch import Tensor

from vcore_kernels._gibbs import utility_variance
from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_values, make_segments, segment_max, segment_sum
from vcore_kernels.spans import spanned

MODES = ("utility", "trajectory", "ess", "loss", "none")


@spanned
def variance_control(
    utility: Tensor,
    q: Tensor,
    *,
    nll: Tensor | None = None,
    mode: str = "utility",
    cap: float | None = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """``alpha = min(cap, sqrt(V_uniform / V_weighted))`` for weights q on tokens with utilities s.

    ============== =================================== =============================
    mode           V_uniform                           V_weighted
    ============== =================================== =============================
    ``utility``    over all tokens, of s_t/n_i         of q_t*s_t
    ``trajectory`` over trajectories, of sum_t s_t/n_i of sum_t q_t*s_t
    ``ess``        1/n_i                               sum_t q_t^2
    ``loss``       uniform loss squared                weighted loss squared
    ``none``       1                                   1
    ============== =================================== =============================

    ``trajectory`` is the paper's equation, ``ess`` its case of uncorrelated utilities (one alpha
    for each trajectory), ``loss`` what its released code does, and ``none`` is 1
    whatever the cap.

    Eager on every device: :func:`vcore_loss` does not come here, its variances are a by-product of
    the launch that makes the weights, and alpha a few operations on 0-dim tensors.

    Variances are unbiased sample variances over supervised tokens; trajectories that are empty or
    hold a non-finite utility are left out. 0/0 is 1, and so is what cannot be known (fewer than two
    samples, non-finite losses). A positive number over 0 is ``cap``, or 1 without one: alpha is
    always finite.

    Args:
        utility: [B, T], [T], or packed [N] or [1, N] with ``cu_seqlens``.
        q: shaped like ``utility``, summing to 1 over each trajectory, as :func:`gibbs_weights`
            returns it.
        nll: shaped like ``utility``; needed for ``"loss"`` alone. No gradient flows.
        cap: the largest alpha; None for no cap.
        mask, cu_seqlens: as for :func:`gibbs_weights`.

    Returns:
        alpha, 0-dim; [S] for ``"ess"``. float32, or float64 for float64 utilities.

    Raises:
        ValueError: unknown mode, cap not positive, ``"loss"`` without nll, ``"trajectory"`` with
            fewer than two trajectories (rows, or segments of cu_seqlens: the host does not know
            which are empty, and if fewer than two are left, alpha is 1), wrong shapes.
        TypeError: wrong dtypes.

    Source: VCORE (arXiv 2510.27462), variance control.
    """
    op = "variance_control"
    check_values(op, "utility", utility)
    check_values(op, "q", q, utility)
    segments = make_segments(op, utility, mask, cu_seqlens)
    check_mode(op, mode, cap, segments.number)
    if nll is not None:
        check_values(op, "nll", nll, utility)
    elif mode == "loss":
        raise ValueError(f"{op}: mode 'loss' compares losses. Pass nll, shaped like utility.")

    dtype = statistics_dtype(utility.dtype)
    if mode == "none" or segments.number == 0:
        return utility.new_ones(segments.number if mode == "ess" else (), dtype=dtype)
    index, valid = segments.segment_of(), segments.valid()
    s, weights = (x.detach().reshape(-1).to(torch.float64) for x in (utility, q))
    count = segment_sum(valid.to(s.dtype), index, segments.number)
    # as precise as q, so that a uniform q gives exactly the uniform statistics
    uniform = (1 / count.clamp(min=1)).to(q.dtype).to(s.dtype)
    if mode == "ess":
        relative = (weights / uniform[index]).where(valid, 0)
        total, square = (segment_sum(x, index, segments.number) for x in (relative, relative**2))
        return alpha_from_ess((total**2 / (count * square)).to(dtype), cap)
    if mode == "loss":
        assert nll is not None
        return alpha_from_loss(nll.reshape(-1), weights / uniform[index], valid, cap).to(dtype)
    broken = segment_sum((valid & ~s.isfinite()).to(s.dtype), index, segments.number) > 0
    known, used = ~broken & (count > 0), valid & ~broken[index]
    magnitude = segment_max(s.abs().where(used, 0), index, segments.number)
    variance = utility_variance(s, weights, uniform, magnitude, used, known, index)
    return alpha_from_variance(variance, mode, cap).to(dtype)


def check_mode(op: str, mode: str, cap: float | None, number: int) -> None:
    """Raises ValueError unless ``mode`` and ``cap`` can serve ``number`` trajectories."""
    if mode not in MODES:
        raise ValueError(
            f"{op}: the mode of variance control must be one of {', '.join(MODES)}, got {mode!r}."
        )
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"{op}: cap must be a positive number or None, got {cap}.")
    if mode == "trajectory" and number < 2:
        raise ValueError(
            f"{op}: mode 'trajectory' takes a variance over trajectories and needs at least 2, got "
            f"{number}. Use a larger batch, or mode 'utility'."
        )


def _bounded_ratio(above: Tensor, below: Tensor, cap: float | None) -> Tensor:
    """above/below: 1 for 0/0 and for what is not finite, ``cap`` (or 1) over 0."""
    one = torch.ones_like(above)
    ratio = one.where(above == below, above / below)
    ratio = ratio.where((below != 0) | (above == 0), 1.0 if cap is None else cap)
    known = above.isfinite() & below.isfinite() & ratio.isfinite() & (ratio >= 0)
    return ratio.where(known, 1)


def _capped(alpha: Tensor, cap: float | None) -> Tensor:
    return alpha if cap is None else alpha.clamp(max=cap)


def alpha_from_variance(variance: Tensor, mode: str, cap: float | None) -> Tensor:
    """alpha for ``"utility"`` and ``"trajectory"`` from ``GibbsStatistics.variance``."""
    uniform, weighted = variance[0 if mode == "utility" else 1].unbind()
    return _capped(
        _bounded_ratio(uniform, weighted, None if cap is None else cap * cap).sqrt(), cap
    )


def alpha_from_ess(ess: Tensor, cap: float | None) -> Tensor:
    """alpha for ``"ess"``, one for each trajectory: 1 where nothing is known."""
    alpha = ess.clamp(max=1).sqrt()
    return _capped(alpha.where(ess.isfinite(), 1), cap)


def alpha_from_loss(
    nll: Tensor, weights: Tensor, valid: Tensor | None, cap: float | None
) -> Tensor:
    """alpha for ``"loss"``: the uniform over the weighted loss; ``weights`` are 1 where uniform."""
    nll = nll.detach().to(torch.float64)
    weighted = nll * weights.to(torch.float64)
    if valid is not None:
        nll, weighted = nll.where(valid, 0), weighted.where(valid, 0)
    return _capped(_bounded_ratio(nll.sum(), weighted.sum(), cap), cap)
