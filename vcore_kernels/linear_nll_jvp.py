"""Forward-mode derivative of the per-token loss of a linear head."""

from typing import TYPE_CHECKING

from torch import Tensor

from vcore_kernels import vocab_parallel
from vcore_kernels._head import HeadOptions
from vcore_kernels._two_points import Second, two_points
from vcore_kernels.spans import spanned

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@spanned
def linear_nll_jvp(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    hidden_tangent: Tensor,
    weight_tangent: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    bias_tangent: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
    group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each token and its derivative along a tangent, from one sweep over the weight.

    The tangent is ``sum over v != target of p_v * (dz_v - dz_target)`` with ``dz = hidden_tangent @
    weight.T + hidden @ weight_tangent.T + bias_tangent``: differences, so that a confident token
    keeps its relative accuracy. Two products of N x V x H (three with ``weight_tangent``) that
    share every load of the weight. No gradient flows through the result.

    A head sharded along the vocabulary is served as by :func:`vcore_kernels.linear_nll`:
    ``weight_tangent`` and ``bias_tangent`` are sharded as ``weight`` is, ``hidden_tangent`` is the
    same on all processes. Two all-reduces, of [N] and of [5, N] float64 numbers.

    Args:
        hidden_tangent: shaped like ``hidden``; cast to its dtype.
        weight_tangent: [V, H] or None for a frozen head; cast to the weight's dtype.
        bias_tangent: [V] or None; needs ``bias``.
        group: as in :func:`vcore_kernels.linear_nll`.
        other arguments: as in :func:`vcore_kernels.linear_nll`.

    Returns:
        (nll, nll_tangent), both shaped like ``target``, float32 (float64 for float64); 0 where
        ignored.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or placements that do not fit.

    Source: the utility of VCORE (arXiv 2510.27462) as a forward-mode derivative,
    docs/mathematics.md.
    """
    op = "linear_nll_jvp"
    options = HeadOptions(softcap, scale, ignore_index)
    weight_tangent = vocab_parallel.local_tangent(op, "weight", weight_tangent, weight)
    bias_tangent = vocab_parallel.local_tangent(op, "bias", bias_tangent, bias)
    shard, weight, bias, hidden, target, hidden_tangent = vocab_parallel.localize(
        op,
        group,
        weight,
        bias,
        hidden=hidden,
        target=target,
        hidden_tangent=hidden_tangent,
    )
    second = Second("tangent", hidden_tangent, weight_tangent, bias_tangent)
    args = (hidden, weight, target, bias, second, options, shift, backend, debug)
    if shard is not None:
        return vocab_parallel.linear_nll_jvp(op, shard, *args)
    return two_points(op, *args)
