"""From per-token losses of B responses to one number: every way in use, in one place."""

from typing import NamedTuple

from torch import Tensor

from vcore_kernels.segments import check_mask, check_values
from vcore_kernels.sft_loss import divide_by_items
from vcore_kernels.spans import spanned


class Aggregation(NamedTuple):
    counts: str | None  # what the sum is divided by: "tokens", "sequences", "rows", or nothing
    row_means: bool = False  # each response by its own length first
    by_length: bool = False  # and by max_length


AGGREGATIONS = {
    "token-mean": Aggregation("tokens"),
    "dapo": Aggregation("tokens"),
    "seq-mean-token-sum": Aggregation("sequences"),
    "seq-mean-token-mean": Aggregation("sequences", row_means=True),
    "seq-mean-token-sum-norm": Aggregation(None, by_length=True),
    "dr-grpo": Aggregation("rows", by_length=True),
}


@spanned
def aggregation_items(mask: Tensor, aggregation: str) -> Tensor:
    """What ``num_items`` of :func:`raft_loss` and :func:`grpo_loss` counts, in this batch.

    Under gradient accumulation the sum of this over the micro-batches of an optimizer step is the
    ``num_items`` of each: the losses then add up to that of the whole batch. (So do those of
    ``"seq-mean-token-sum-norm"``, which has nothing to count, whatever ``num_items`` is.)

    ============================================= ===========================================
    ``token-mean``, ``dapo``                      supervised tokens
    ``seq-mean-token-sum``, ``seq-mean-token-mean`` responses with a supervised token
    ``dr-grpo``, ``seq-mean-token-sum-norm``      rows
    ============================================= ===========================================

    Args:
        mask: [B, T], bool or integer: the supervised tokens.

    Returns:
        int64, 0-dim, on the device of ``mask``.

    Raises:
        ValueError: unknown aggregation, wrong shape. TypeError: wrong dtype.
    """
    op = "aggregation_items"
    checked = check_mask(op, "mask", mask, mask)
    if checked is None or checked.dim() != 2:
        got = None if checked is None else list(checked.shape)
        raise ValueError(f"{op}: mask must be [B, T], got {got}.")
    return _items(checked, find_aggregation(op, aggregation))


def _items(mask: Tensor, how: Aggregation) -> Tensor:
    if how.counts == "tokens":
        return mask.sum()
    if how.counts == "sequences":
        return mask.any(1).sum()
    return mask.sum().new_full((), mask.shape[0])


def find_aggregation(op: str, aggregation: str, max_length: int | None = None) -> Aggregation:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"{op}: aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}."
        )
    if max_length is not None and max_length < 1:
        raise ValueError(f"{op}: max_length must be 1 token or more, got {max_length}.")
    return AGGREGATIONS[aggregation]


def aggregate(
    op: str,
    losses: Tensor,  # [B, T], finite and connected to the graph wherever the mask does not allow
    mask: Tensor,  # bool [B, T]
    row_weight: Tensor | None,  # [B]
    aggregation: str,
    num_items: int | Tensor | None,
    max_length: int | None,
) -> Tensor:
    how = find_aggregation(op, aggregation, max_length)
    rows = losses.where(mask, 0).sum(1)
    if how.row_means:
        rows = rows / mask.sum(1).clamp(min=1)
    if row_weight is not None:
        rows = rows * row_weight
    total = rows.sum()
    if how.by_length:
        total = total / max(mask.shape[1] if max_length is None else max_length, 1)
    if how.counts is None:
        return total
    return divide_by_items(op, total, _items(mask, how), num_items)


def check_rows(op: str, name: str, values: Tensor, logp: Tensor) -> Tensor:
    """``values`` [B], without its graph, in the dtype of ``logp`` [B, T]."""
    check_values(op, name, values)
    if values.shape != logp.shape[:1]:
        raise ValueError(
            f"{op}: {name} has shape {list(values.shape)}, expected {list(logp.shape[:1])}: "
            "one number for each response."
        )
    if values.device != logp.device:
        raise ValueError(f"{op}: {name} is on {values.device}, expected {logp.device}.")
    return values.detach().to(logp.dtype)
