"""Token utilities turned into a distribution over each trajectory's tokens."""

from typing import NamedTuple

from torch import Tensor

from vcore_kernels._gibbs import gibbs_statistics, resolve_rule
from vcore_kernels.segments import check_values, make_segments
from vcore_kernels.spans import spanned


class GibbsWeights(NamedTuple):
    """What :func:`gibbs_weights` returns; S trajectories, statistics in the dtype of ``q``."""

    q: Tensor  # like utility: the weights, summing to 1 over each trajectory, 0 where masked
    tau: Tensor  # [S] 0 where the weights are uniform for want of anything to rank
    kl: Tensor  # [S] KL(q || uniform), nats
    ess: Tensor  # [S] effective sample size 1 / (n * sum q^2), in (0, 1]; 1 for an empty trajectory
    saturated: Tensor  # bool [S] kl_budget is more than these utilities can spend at any tau
    constant: Tensor  # bool [S] utilities equal, or as good as equal (noise floor)
    finite: Tensor  # bool [S] False where a supervised utility is NaN or infinite: uniform weights


@spanned
def gibbs_weights(
    utility: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    tau: float | None = None,
    temperature: float | None = None,
    kl_budget: float | None = None,
    kl_scope: str = "trajectory",
    backend: str = "auto",
) -> GibbsWeights:
    """Gibbs distribution ``q_t = softmax_t(tau * s_t)`` over each trajectory's supervised tokens.

    Exactly one of three says how sharp it is: ``tau`` itself (per unit of utility),
    ``temperature`` = 1/tau, or ``kl_budget`` = delta in nats, the largest tau with
    KL(q || uniform) <= delta. Where delta exceeds what the utilities can reach, log(n/m) with m the
    multiplicity of the maximum, q is uniform over the maxima, tau is a value that gives it, and
    ``saturated`` says so (also for constant and empty trajectories).

    Under a budget, utilities that differ by less than the rounding of their own computation count
    as constant (8 units of float32's or float64's machine precision of the largest |utility|; of
    16-bit utilities one unit of theirs): uniform weights and tau = 0. A trajectory with a
    supervised NaN or infinity falls back to uniform weights, tau = 0, and ``finite`` is False
    there. Nothing waits for an accelerator.

    Args:
        utility: [B, T] (a trajectory per row), [T] (one), or packed [N] or [1, N] with
            ``cu_seqlens``. Any floating dtype; 32 bits or fewer give float32 results, float64 gives
            float64. No gradient flows.
        mask: shaped like ``utility``, bool or integer: the supervised tokens. None: all of them.
        cu_seqlens: int32 [S + 1], 0 to N, never falling. Trajectories may be empty.
        kl_scope: ``"trajectory"``: each one spends the budget. ``"batch"``: one tau for all, at
            which the mean KL over the trajectories that are not empty and finite is the budget, so
            that one whose utilities hardly differ is not sharpened into noise.
        backend: ``"auto"``, ``"triton"``, ``"cpp"`` or ``"reference"``.

    Raises:
        ValueError: not exactly one of the three; tau or kl_budget negative, temperature not
            positive, or not finite; wrong shapes; cu_seqlens falling or not going from 0 to N.
        TypeError: wrong dtypes.

    Source: VCORE (arXiv 2510.27462), the KL-regularised reweighting problem and its Gibbs solution.
    """
    op = "gibbs_weights"
    rule, value = resolve_rule(op, tau, temperature, kl_budget, kl_scope)
    check_values(op, "utility", utility)
    segments = make_segments(op, utility, mask, cu_seqlens)
    stats = gibbs_statistics(op, utility, segments, rule, value, backend)
    return GibbsWeights(stats.q.view(utility.shape), *stats[2:8])
