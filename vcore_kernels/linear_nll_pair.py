"""Per-token loss at two parameter points and their difference, from one sweep over the weight."""

from torch import Tensor

from vcore_kernels import vocab_parallel
from vcore_kernels._head import HeadOptions
from vcore_kernels._two_points import Second, two_points
from vcore_kernels.spans import spanned


@spanned
def linear_nll_pair(
    hidden: Tensor,
    hidden_perturbed: Tensor,
    weight: Tensor,
    target: Tensor,
    weight_perturbed: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    bias_perturbed: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of each token, and how much it exceeds the loss at a perturbed point.

    The compiled backends take the difference between the *inputs* of both points and carry it
    through the logits: ``nll - nll_perturbed = -log1p((1 - p_target) * expm1(change))``, where
    ``change`` is the log of the mean of exp(dz_v) over the other classes minus dz_target. The error
    is one rounding of the inputs' difference to their dtype, however close the points are, where
    subtracting two losses leaves rounding noise. Two products of N x V x H (three with
    ``weight_perturbed``) that share every load of the weight. No gradient flows through the result.

    Args:
        hidden_perturbed: shaped like ``hidden``.
        weight_perturbed: [V, H], or None where the head is the same at both points.
        bias_perturbed: [V] or None; needs ``bias``.
        other arguments: as in :func:`vcore_kernels.linear_nll`.

    Returns:
        (nll, nll - nll_perturbed), both shaped like ``target``, float32 (float64 for float64); 0
        where ignored.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a DTensor.

    Source: the finite-difference utility of VCORE (arXiv 2510.27462), before its division by
    epsilon.
    """
    vocab_parallel.refuse_dtensors("linear_nll_pair", hidden=hidden, weight=weight, bias=bias)
    second = Second("perturbed", hidden_perturbed, weight_perturbed, bias_perturbed)
    options = HeadOptions(softcap, scale, ignore_index)
    return two_points(
        "linear_nll_pair", hidden, weight, target, bias, second, options, shift, backend, debug
    )
