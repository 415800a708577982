"""Loss at two parameter points and their difference."""

from torch import Tensor

from vcore_kernels._head import HeadOptions, head_rows, to_labels
from vcore_kernels.backends import reference


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
    options = HeadOptions(softcap, scale, ignore_index)
    rows = head_rows("linear_nll_pair", hidden, weight, target, bias, options, shift, debug)
    nll, difference = reference.linear_nll_pair(
        rows.hidden,
        hidden_perturbed.reshape(rows.hidden.shape).to(rows.hidden.dtype),
        rows.weight,
        rows.target,
        weight_perturbed,
        rows.bias,
        bias_perturbed,
        softcap,
        scale,
        ignore_index,
    )
    return to_labels(nll, target.shape, shift), to_labels(difference, target.shape, shift)
