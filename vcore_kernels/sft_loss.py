"""Uniform supervision, and the weighted sum that every objective here ends in."""

from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import check_mask, check_values
from vcore_kernels.spans import spanned


@spanned
def sft_loss(
    nll: Tensor, *, mask: Tensor | None = None, num_items: int | Tensor | None = None
) -> Tensor:
    """Supervised fine-tuning: ``sum_t nll_t / num_items`` over the supervised tokens.

    Args:
        nll: per-token losses in nats, any shape, any floating dtype.
        mask: shaped like ``nll``, bool or integer: the supervised tokens. None: all of them.
        num_items: what the sum is divided by, a number or a 0-dim tensor; None for the number of
            supervised tokens. Under gradient accumulation pass the count of the whole optimizer
            step. Less than 1 counts as 1: a batch without supervised tokens has loss 0, still
            connected to ``nll``.

    Returns:
        0-dim loss, float32 (float64 for float64), differentiable in ``nll``.

    Raises:
        ValueError: shapes that differ, negative num_items. TypeError: wrong dtypes.
    """
    check_values("sft_loss", "nll", nll)
    mask = check_mask("sft_loss", "mask", mask, nll)
    return weighted_sum("sft_loss", nll, None, mask, num_items)


def weighted_sum(
    op: str,
    nll: Tensor,
    weights: Tensor | None,
    mask: Tensor | None,
    num_items: int | Tensor | None,
) -> Tensor:
    """``sum_t weights_t * nll_t / num_items`` where the mask allows.

    Weights of 1 leave every bit as without weights. Masked entries and those of weight 0 count for
    nothing, whatever they hold, and get no gradient.
    """
    losses = nll.to(statistics_dtype(nll.dtype))
    if mask is not None:
        losses = losses.where(mask, 0)
    if weights is not None:
        weights = weights if mask is None else weights.where(mask, 0)
        losses = losses.where(weights != 0, 0) * weights
    total = losses.sum()
    count = total.new_full((), nll.numel()) if mask is None else mask.sum()
    return divide_by_items(op, total, count, num_items)


def divide_by_items(
    op: str, total: Tensor, count: Tensor, num_items: int | Tensor | None
) -> Tensor:
    """``total`` over ``num_items``, over ``count`` where that is None, never over less than 1."""
    if num_items is None:
        items = count
    elif isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(
                f"{op}: num_items must be one number, got shape {list(num_items.shape)}."
            )
        items = num_items.detach().reshape(())
    elif num_items < 0:
        raise ValueError(f"{op}: num_items must not be negative, got {num_items}.")
    else:
        items = total.new_full((), num_items)
    return total / items.to(device=total.device, dtype=total.dtype).clamp(min=1)
