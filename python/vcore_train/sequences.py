"""Where the trajectories of a batch lie: rows of a padded batch, or segments of a packed one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcore_train.modeling import segment_starts

WORKSPACE = 1 << 22  # entries of a temporary that serves several sequences at once


@dataclass(frozen=True)
class Sequences:
    """The S sequences of a batch [B, T], and views of its N = B * T tokens as blocks [s, L].

    L is the length of the longest. An entry beyond a shorter sequence's end repeats the sequence's
    last token, so that no value of another one gets in; ``fill`` writes over such entries.
    """

    shape: torch.Size  # [B, T]
    offsets: Tensor  # int64 [S + 1], from 0 to N
    length: int  # L
    index: Tensor | None  # int64 [S, L] into the N tokens; None where sequence i is row i
    mask: Tensor | None  # bool [S, L]: whether the entry is the sequence's own

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Sequences":
        """Of a batch as a data collator makes it, with labels [B, T]. Waits for the device."""
        starts = segment_starts(inputs)
        begin = starts.flatten().nonzero()[:, 0]
        offsets = torch.cat([begin, begin.new_tensor([starts.numel()])])
        if begin.shape[0] == starts.shape[0]:
            return cls(starts.shape, offsets, starts.shape[1], None, None)
        lengths = offsets.diff()
        place = torch.arange(int(lengths.max()), device=begin.device)
        index = begin[:, None] + torch.minimum(place, lengths[:, None] - 1)
        return cls(starts.shape, offsets, place.shape[0], index, place < lengths[:, None])

    @property
    def number(self) -> int:
        """S."""
        return self.offsets.shape[0] - 1

    @property
    def tokens(self) -> int:
        """N."""
        return self.shape.numel()

    @property
    def packed(self) -> bool:
        return self.index is not None

    def segment(self) -> Tensor:
        """The sequence of each token: int64 [N]."""
        tokens = torch.arange(self.tokens, device=self.offsets.device)
        return torch.bucketize(tokens, self.offsets[1:], right=True)

    def parts(self, entries: int) -> Iterator[slice]:
        """As many sequences at a time as have temporaries of ``entries`` each in the workspace."""
        step = max(1, WORKSPACE // max(1, entries))
        for begin in range(0, self.number, step):
            yield slice(begin, min(begin + step, self.number))

    def block(self, values: Tensor, part: slice, fill: float | None = None) -> Tensor:
        """``values`` [N, ...] of the sequences ``part``: [s, L, ...]."""
        if self.index is None or self.mask is None:
            return values.view(self.number, self.length, *values.shape[1:])[part]
        out = values[self.index[part]]
        if fill is None:
            return out
        own = self.mask[part].view(*out.shape[:2], *[1] * (out.dim() - 2))
        return out.masked_fill(~own, fill)
