"""Forward-mode derivative of the per-token loss of a linear head."""

import torch
from torch import Tensor

from vcore_kernels import _head_ops  # noqa: F401  (declares the operators)
from vcore_kernels._head import HeadOptions, head_rows, rows_like, to_labels
from vcore_kernels.backends import reference, resolve


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
) -> tuple[Tensor, Tensor]:
    """Loss of each token and its derivative along a tangent, from one sweep over the weight.

    The tangent is ``sum over v != target of p_v * (dz_v - dz_target)`` with ``dz = hidden_tangent @
    weight.T + hidden @ weight_tangent.T + bias_tangent``: differences, so that a confident token
    keeps its relative accuracy. Two products of N x V x H (three with ``weight_tangent``) that
    share every load of the weight. No gradient flows through the result.

    Args:
        hidden_tangent: shaped like ``hidden``; cast to its dtype.
        weight_tangent: [V, H] or None for a frozen head; cast to the weight's dtype.
        bias_tangent: [V] or None; needs ``bias``.
        Everything else as in :func:`vcore_kernels.linear_nll`.

    Returns:
        (nll, nll_tangent), both shaped like ``target``, float32 (float64 for float64); 0 where
        ignored.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: the utility of VCORE (arXiv 2510.27462) as a forward-mode derivative, docs/design.md.
    """
    op = "linear_nll_jvp"
    options = HeadOptions(softcap, scale, ignore_index)
    rows = head_rows(op, hidden, weight, target, bias, options, shift, debug)
    hidden_tangent = rows_like(op, "hidden_tangent", hidden_tangent, rows.hidden)
    if weight_tangent is not None:
        weight_tangent = rows_like(op, "weight_tangent", weight_tangent, rows.weight)
    if bias_tangent is not None:
        if rows.bias is None:
            raise ValueError(f"{op}: bias_tangent was given without bias. Pass bias as well.")
        bias_tangent = rows_like(op, "bias_tangent", bias_tangent, rows.bias)
    if resolve(op, backend, *rows.tensors(), hidden_tangent) == "reference":
        call, raw = reference.linear_nll_jvp, (softcap, scale, ignore_index)
    else:
        call, raw = torch.ops.vcore_kernels.linear_nll_jvp, options.raw()
    with torch.no_grad():
        nll, tangent = call(
            rows.hidden,
            rows.weight,
            rows.target,
            hidden_tangent,
            weight_tangent,
            rows.bias,
            bias_tangent,
            *raw,
        )
    return to_labels(nll, target.shape, shift), to_labels(tangent, target.shape, shift)
