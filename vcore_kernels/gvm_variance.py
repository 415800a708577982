"""How much a gradient estimate from sampled responses varies: the exact value and GVM's bound."""

import torch
from torch import Tensor

from vcore_kernels._apportion import check_budget, check_prompts, check_rates
from vcore_kernels.gvm_allocate import gvm_weights
from vcore_kernels.segments import check_integers
from vcore_kernels.spans import spanned


@spanned
def gvm_variance(
    grad_rms: Tensor, mean_grad_norm: Tensor, accept_rate: Tensor, counts: Tensor
) -> Tensor:
    """``(G_rms^2 / p - |mu|^2) / n``: each prompt's share of the estimator's variance, exactly.

    The estimator of prompt i is ``1/(n p) sum_j 1[response j accepted] grad log p(y_j)``, unbiased
    for mu, the mean gradient of an accepted response; its variance is the expected squared distance
    from mu. Prompts are sampled independently: their sum over m prompts has the sum of these as its
    variance, their mean 1/m^2 of that.

    Args:
        grad_rms: [m], floating: root mean square over accepted responses of the norm of the
            gradient of the summed log-probability.
        mean_grad_norm: [m]: |mu|, the norm of the mean of these gradients, at most ``grad_rms``.
        accept_rate: [m]: p, the true probability of acceptance.
        counts: [m], integer: n, samples for each prompt.

    Returns:
        float64 [m] on the host. 0 where p or G is 0 (nothing to estimate), infinite where n is 0
        and both are not: such a prompt has no unbiased estimator.

    Raises:
        ValueError: wrong shapes, NaN, infinite or negative values, p beyond 1. TypeError: dtypes.

    Source: docs/mathematics.md; the first term alone is the bound of GVM (arXiv 2505.02391),
    lemma 1.
    """
    op = "gvm_variance"
    rms = check_prompts(op, "grad_rms", grad_rms)
    mean = check_prompts(op, "mean_grad_norm", mean_grad_norm, rms.shape[0])
    p = check_rates(op, "accept_rate", accept_rate, rms.shape[0])
    check_integers(op, "counts", counts)
    n = check_prompts(op, "counts", counts.to(torch.float64), rms.shape[0])
    once = (rms.square() / p - mean.square()).clamp(min=0)
    return (once / n).where((p > 0) & (rms > 0), 0).nan_to_num(nan=0.0, posinf=torch.inf)


@spanned
def gvm_variance_bound(
    grad_norm: Tensor,
    accept_rate: Tensor,
    budget: int,
    *,
    alpha: float = 1e-3,
    beta: float = 2.0,
) -> float:
    """``(sum_i a_i)^2 / budget``: the least of GVM's regularised bound over all allocations.

    ``a = G / sqrt(p + alpha / p^(beta-1))``. The bound of an allocation n is ``sum a_i^2 / n_i``;
    real n in proportion to a reach this value, and :func:`gvm_allocate` rounds them.

    Args, errors: as for :func:`gvm_allocate`; the budget must not be 0.
    """
    op = "gvm_variance_bound"
    budget = check_budget(op, budget)
    if budget == 0:
        raise ValueError(f"{op}: budget must be 1 sample or more, got 0.")
    a = gvm_weights(op, grad_norm, accept_rate, alpha, beta)
    largest = float(grad_norm.max()) if a.any() else 0.0
    return (largest * float(a.sum())) ** 2 / budget
