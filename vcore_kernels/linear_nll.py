"""Per-token negative log-likelihood of a linear head, without the N x V logits."""

from torch import Tensor

from vcore_kernels._head import HeadOptions, head_rows, to_labels
from vcore_kernels.backends import reference


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
) -> Tensor:
    options = HeadOptions(softcap, scale, ignore_index)
    rows = head_rows("linear_nll", hidden, weight, target, bias, options, shift, debug)
    nll = reference.linear_nll(*rows, softcap, scale, ignore_index)
    return to_labels(nll, target.shape, shift)
