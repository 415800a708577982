"""Random SFT: supervise a random subset of each response, the baseline for choosing tokens."""

import torch
from torch import Tensor

from vcore_kernels.segments import check_mask, make_segments, segment_sum
from vcore_kernels.spans import spanned


@spanned
def random_supervision(
    mask: Tensor,
    keep: float,
    *,
    always: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A random subset of the supervised tokens, so that a share ``keep`` of each trajectory stays.

    A trajectory of n supervised tokens keeps round(keep*n) of them, at least one where keep > 0.
    The tokens of ``always`` (say, the answer) come first and are all kept, even where they are more
    than that.

    Args:
        mask: [B, T], [T], or packed [N] or [1, N] with ``cu_seqlens``: the supervised tokens, bool
            or integer.
        keep: share in [0, 1].
        always: shaped like ``mask``; entries outside ``mask`` are ignored.
        generator: source of randomness; its device decides where the random numbers are drawn.

    Returns:
        bool mask, shaped like ``mask``.

    Raises:
        ValueError: keep outside [0, 1], wrong shapes. TypeError: wrong dtypes.

    Source: the random-mask baseline of VCORE (arXiv 2510.27462), which keeps the answer and 20% of
    the response.
    """
    op = "random_supervision"
    if not 0 <= keep <= 1:
        raise ValueError(f"{op}: keep must be a share between 0 and 1, got {keep}.")
    checked = check_mask(op, "mask", mask, mask)
    if checked is None:
        raise TypeError(f"{op}: mask must be a tensor, got None.")
    chosen = check_mask(op, "always", always, mask)
    segments = make_segments(op, mask, mask, cu_seqlens)
    index, valid = segments.segment_of(), segments.valid()

    device = mask.device if generator is None else generator.device
    priority = torch.rand(mask.numel(), generator=generator, device=device).to(mask.device)
    if chosen is not None:
        chosen = chosen.reshape(-1) & valid
        priority = priority.where(~chosen, -1)
    priority = priority.where(valid, 2)
    order = priority.argsort()
    order = order[index[order].argsort(stable=True)]  # by segment, then by priority
    rank = torch.empty_like(order)
    rank[order] = torch.arange(mask.numel(), device=mask.device)
    rank = rank - segments.offsets[index]

    count = segment_sum(valid.to(torch.float64), index, segments.number)
    wanted = (keep * count).round()
    if keep > 0:
        wanted = wanted.clamp(min=1)
    kept = valid & (rank < wanted[index])
    if chosen is not None:
        kept = kept | chosen
    return kept.view(mask.shape)
