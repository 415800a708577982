"""Dynamic fine-tuning: each token's loss scaled by the token's own probability."""

from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_mask, check_values
from vcore_kernels.sft_loss import weighted_sum
from vcore_kernels.spans import spanned


@spanned
def dft_loss(
    nll: Tensor, *, mask: Tensor | None = None, num_items: int | Tensor | None = None
) -> Tensor:
    """``sum_t p_t * nll_t / num_items`` with p_t = exp(-nll_t) held fixed: descent on -sum p_t.

    Without the stop-gradient the sign of the update flips where p < 1/e.

    Args, returns and errors are those of :func:`sft_loss`. Source: DFT (arXiv 2508.05629).
    """
    check_values("dft_loss", "nll", nll)
    mask = check_mask("dft_loss", "mask", mask, nll)
    probability = (-nll.detach().to(statistics_dtype(nll.dtype))).exp()
    return weighted_sum("dft_loss", nll, probability, mask, num_items)
