"""From the utilities of an optimizer step to the factor on each token's loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vcore_kernels import vcore_loss
from vcore_train.config import VcoreOptions
from vcore_train.processes import Processes
from vcore_train.supervised import SupervisedTokens


@dataclass(frozen=True)
class StepWeights:
    """The weights of an optimizer step and what to log of them."""

    weights: list[Tensor]  # like each micro-batch's labels: alpha * q * n, 0 if not supervised
    means: dict[str, Tensor]  # 0-dim figures
    saturated: Tensor  # trajectories whose KL budget could not be reached
    finite: Tensor  # 0-dim bool: False if a utility is NaN or infinite, and the weights useless


def weigh(
    args: VcoreOptions,
    tokens: SupervisedTokens,
    nll: Sequence[Tensor],
    utility: Sequence[Tensor],
    processes: Processes | None = None,
) -> StepWeights:
    """Gibbs weights of every trajectory of the step, and one alpha for all of them.

    ``nll`` and ``utility``: one tensor for each micro-batch, like its labels. ``kl_scope="batch"``
    and the variances span the whole step over all processes: each gathers the nll and utilities of
    all (8 bytes a token), and comes to the same result.
    """
    values = torch.stack([tokens.packed(nll), tokens.packed(utility)], -1)  # [N, 2]
    values, cu_seqlens, own = _of_all(tokens, values, processes or Processes())
    nll_of_all, utility_of_all = values.unbind(-1)
    mode = args.variance_control
    if mode == "trajectory" and cu_seqlens.numel() < 3:
        mode = "none"  # a last step with a single trajectory has no variance over trajectories
    result = vcore_loss(
        nll_of_all.contiguous(),
        utility_of_all.contiguous(),
        cu_seqlens=cu_seqlens,
        kl_scope=args.kl_scope,
        variance_control=mode,
        cap=args.variance_cap,
        tau=args.tau,
        temperature=args.temperature,
        kl_budget=args.kl_budget,
    )
    solved = ~(result.constant | result.saturated)  # elsewhere tau says nothing
    return StepWeights(
        weights=tokens.unpacked(result.weights[own]),
        means={
            "tau": _mean_where(result.tau, solved),
            "kl": result.kl.mean(),
            "ess": result.ess.mean(),
            "alpha": result.alpha.mean(),
            "utility_mean": utility_of_all.mean(),
            "utility_std": utility_of_all.std(correction=0),
        },
        saturated=(result.saturated & ~result.constant).sum(),
        finite=torch.isfinite(utility_of_all).all(),
    )


def _of_all(
    tokens: SupervisedTokens, values: Tensor, processes: Processes
) -> tuple[Tensor, Tensor, Tensor]:
    """``values`` [N, k] and segments of all processes, and where this one's tokens are in them.

    Ordered by micro-batch and then by process, which is the order of one process that takes the
    micro-batches of all at once: so the numbers do not depend on how many share the work.
    """
    counts = tokens.cu_seqlens.diff().long()
    if processes.group is None:
        return values, tokens.cu_seqlens, torch.arange(values.shape[0], device=values.device)
    micro_batch = torch.repeat_interleave(
        torch.arange(len(tokens.segments), device=counts.device),
        torch.tensor(tokens.segments, device=counts.device),
    )
    segments = processes.gather(torch.stack([micro_batch, counts], -1))
    rank = torch.cat([part.new_full((len(part),), r) for r, part in enumerate(segments)])
    micro_batch, counts = torch.cat(segments).unbind(-1)
    order = torch.argsort(micro_batch, stable=True)  # of the segments, which are in order of ranks
    begins = counts.cumsum(0) - counts
    counts, rank, begins = counts[order], rank[order], begins[order]
    ends = counts.cumsum(0)
    # Token i of the result is token source[i] of the gathered ones.
    source = torch.arange(int(counts.sum()), device=counts.device)
    source = source + (begins - (ends - counts)).repeat_interleave(counts)
    own = (rank == processes.rank).repeat_interleave(counts).nonzero()[:, 0]
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
    return torch.cat(processes.gather(values))[source], cu_seqlens, own


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the chosen values, 0 if there is none."""
    return values.where(where, 0).sum() / where.sum().clamp(min=1)
