"""Forward-mode derivative of the per-token loss of a linear head."""

from torch import Tensor

from vcore_kernels._head import HeadOptions, head_rows, to_labels
from vcore_kernels.backends import reference


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
    options = HeadOptions(softcap, scale, ignore_index)
    rows = head_rows("linear_nll_jvp", hidden, weight, target, bias, options, shift, debug)
    nll, tangent = reference.linear_nll_jvp(
        rows.hidden,
        rows.weight,
        rows.target,
        hidden_tangent.reshape(rows.hidden.shape),
        weight_tangent,
        rows.bias,
        bias_tangent,
        softcap,
        scale,
        ignore_index,
    )
    return to_labels(nll, target.shape, shift), to_labels(tangent, target.shape, shift)
