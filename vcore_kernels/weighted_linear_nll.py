"""Weighted sum of per-token losses whose weights are known before the pass."""

from torch import Tensor

from vcore_kernels.linear_nll import linear_nll


def weighted_linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    nll = linear_nll(
        hidden,
        weight,
        target,
        bias=bias,
        softcap=softcap,
        scale=scale,
        ignore_index=ignore_index,
        shift=shift,
        backend=backend,
        debug=debug,
    )
    return (token_weight * nll).sum(), nll.detach()
