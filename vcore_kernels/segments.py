"""Trajectories in one form: rows of a padded batch, or ``cu_seqlens`` over packed tokens."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """S consecutive segments over N flat entries, of which ``mask`` says which are supervised.

    A segment may be empty, and may have no supervised entry.
    """

    offsets: Tensor  # int64 [S + 1], from 0 to N, never falling
    mask: Tensor | None  # bool [N]; None: all of them
    size: int  # N

    @property
    def number(self) -> int:
        """S, known without looking at the device."""
        return self.offsets.shape[0] - 1

    def valid(self) -> Tensor:
        """Which entries are supervised: bool [N]."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.size, dtype=torch.bool, device=self.offsets.device)

    def segment_of(self) -> Tensor:
        """The segment of each entry: int64 [N]."""
        positions = torch.arange(self.size, device=self.offsets.device)
        return torch.bucketize(positions, self.offsets[1:], right=True)


def segment_sum(values: Tensor, index: Tensor, number: int) -> Tensor:
    """Sums of ``values`` [N] over each segment: [S]."""
    return values.new_zeros(number).index_add(0, index, values)


def segment_max(values: Tensor, index: Tensor, number: int) -> Tensor:
    """Maxima of ``values`` [N] over each segment: [S]; minus infinity for an empty one."""
    lowest = values.new_full((number,), -torch.inf)
    return lowest.scatter_reduce(0, index, values, "amax")


def check_values(op: str, name: str, values: Tensor, like: Tensor | None = None) -> None:
    """Raises unless ``values`` is a floating-point tensor, of the shape and device of ``like``."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{op}: {name} must be a floating-point tensor, got {kind}.")
    if like is None:
        return
    if values.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(values.shape)}, expected {list(like.shape)}: "
            "one value for each token."
        )
    if values.device != like.device:
        raise ValueError(f"{op}: {name} is on {values.device}, expected {like.device}.")


def check_integers(op: str, name: str, values: Tensor) -> None:
    """Raises unless ``values`` is a tensor of integers."""
    whole = isinstance(values, Tensor) and not (
        values.is_floating_point() or values.is_complex() or values.dtype == torch.bool
    )
    if not whole:
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{op}: {name} must be an integer tensor, got {kind}.")


def check_mask(op: str, name: str, mask: Tensor | None, values: Tensor) -> Tensor | None:
    """``mask`` as bool, checked against the shape and device of ``values``."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(mask).__name__}.")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{op}: {name} must be bool or integer, got {mask.dtype}. Pass labels != -100."
        )
    if mask.shape != values.shape:
        raise ValueError(
            f"{op}: {name} has shape {list(mask.shape)}, expected {list(values.shape)}: "
            "one entry for each token."
        )
    if mask.device != values.device:
        raise ValueError(f"{op}: {name} is on {mask.device}, expected {values.device}.")
    return mask if mask.dtype == torch.bool else mask != 0


def make_segments(
    op: str, values: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Segments:
    """The segments of ``values``: its rows, or what ``cu_seqlens`` says. ``op`` names the caller.

    Args:
        values: [B, T] (B segments), [T] (one segment), or with ``cu_seqlens`` [N] or [1, N].
        mask: bool or integer, shaped like ``values``; supervised where not 0.
        cu_seqlens: int32 or int64 [S + 1], from 0 to N, never falling; equal neighbours make an
            empty segment. On an accelerator its contents are checked asynchronously: an error
            surfaces as a device-side assertion.

    Raises:
        TypeError: wrong dtypes. ValueError: wrong shapes, devices, or contents of ``cu_seqlens``.
    """
    mask = check_mask(op, "mask", mask, values)
    flat_mask = None if mask is None else mask.reshape(-1)
    if cu_seqlens is None:
        if values.dim() not in (1, 2):
            raise ValueError(
                f"{op}: expected [B, T], or packed [N] with cu_seqlens, got shape "
                f"{list(values.shape)}."
            )
        rows, length = (1, values.shape[0]) if values.dim() == 1 else values.shape
        offsets = torch.arange(rows + 1, device=values.device) * length
        return Segments(offsets, flat_mask, values.numel())

    if values.dim() not in (1, 2) or (values.dim() == 2 and values.shape[0] != 1):
        raise ValueError(
            f"{op}: cu_seqlens goes with packed [N] (or [1, N]), got shape {list(values.shape)}. "
            "Leave cu_seqlens out for a padded batch."
        )
    check_offsets(op, cu_seqlens, values, values.numel())
    return Segments(cu_seqlens.to(torch.int64), flat_mask, values.numel())


def check_offsets(op: str, cu_seqlens: Tensor, values: Tensor, size: int) -> None:
    """Raises unless ``cu_seqlens`` cuts ``size`` packed tokens on the device of ``values``."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens must be an int32 tensor, got {kind}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens must be [S + 1], starting with 0, got shape "
            f"{list(cu_seqlens.shape)}."
        )
    if cu_seqlens.device != values.device:
        raise ValueError(f"{op}: cu_seqlens is on {cu_seqlens.device}, expected {values.device}.")
    if torch.compiler.is_compiling():
        return
    rising = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == size)
    if cu_seqlens.device.type != "cpu":
        torch._assert_async(rising & ends)
        return
    if cu_seqlens[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must start at 0, got {int(cu_seqlens[0])}.")
    if not rising:
        at = int((cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()[0])
        raise ValueError(
            f"{op}: cu_seqlens must be increasing, got {int(cu_seqlens[at])} then "
            f"{int(cu_seqlens[at + 1])} at position {at + 1}."
        )
    if cu_seqlens[-1] != size:
        raise ValueError(
            f"{op}: cu_seqlens must end at the number of packed tokens, {size}, got "
            f"{int(cu_seqlens[-1])}."
        )
