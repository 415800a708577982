"""From the utilities of an optimizer step to the factor on each token's loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vcore_kernels import vcore_loss
from vcore_train.config import VcoreConfig
from vcore_train.supervised import SupervisedTokens


@dataclass(frozen=True)
class StepWeights:
    """The weights of an optimizer step and what to log of them."""

    weights: list[Tensor]  # like each micro-batch's labels: alpha * q * n, 0 if not supervised
    means: dict[str, Tensor]  # 0-dim figures
    saturated: Tensor  # trajectories whose KL budget could not be reached
    finite: Tensor  # 0-dim bool: False if a utility is NaN or infinite, and the weights useless


def weigh(
    args: VcoreConfig,
    tokens: SupervisedTokens,
    nll: Sequence[Tensor],
    utility: Sequence[Tensor],
) -> StepWeights:
    """Gibbs weights of every trajectory of the step, and one alpha for all of them.

    ``nll`` and ``utility``: one tensor for each micro-batch, like its labels. ``kl_scope="batch"``
    and the variances span the whole step.
    """
    packed_nll, packed_utility = tokens.packed(nll), tokens.packed(utility)
    mode = args.variance_control
    if mode == "trajectory" and tokens.cu_seqlens.numel() < 3:
        mode = "none"  # a last step with a single trajectory has no variance over trajectories
    result = vcore_loss(
        packed_nll,
        packed_utility,
        cu_seqlens=tokens.cu_seqlens,
        kl_scope=args.kl_scope,
        variance_control=mode,
        cap=args.variance_cap,
        tau=args.tau,
        temperature=args.temperature,
        kl_budget=args.kl_budget,
    )
    solved = ~(result.constant | result.saturated)  # elsewhere tau says nothing
    return StepWeights(
        weights=tokens.unpacked(result.weights),
        means={
            "tau": _mean_where(result.tau, solved),
            "kl": result.kl.mean(),
            "ess": result.ess.mean(),
            "alpha": result.alpha.mean(),
            "utility_mean": packed_utility.mean(),
            "utility_std": packed_utility.std(correction=0),
        },
        saturated=(result.saturated & ~result.constant).sum(),
        finite=torch.isfinite(packed_utility).all(),
    )


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the chosen values, 0 if there is none."""
    return values.where(where, 0).sum() / where.sum().clamp(min=1)
