"""The supervised tokens of the micro-batches of an optimizer step, as one packed vector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcore_train.modeling import IGNORE_INDEX, segment_starts, supervised_labels


@dataclass(frozen=True)
class SupervisedTokens:
    """Maps between per-label values of several batches, each [B, T], and packed ones [N].

    Packed order is batch by batch, row by row; each trajectory is one segment of ``cu_seqlens``,
    and trajectories without a supervised token have none. So weights can be solved for a whole
    optimizer step at once, whatever the shapes of its micro-batches.
    """

    positions: tuple[Tensor, ...]  # of each batch, into its flattened labels
    shapes: tuple[torch.Size, ...]  # of each batch's labels
    cu_seqlens: Tensor  # int32 [S + 1]
    segments: tuple[int, ...]  # trajectories in each batch

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Any]]) -> "SupervisedTokens":
        positions, shapes, counts = [], [], []
        for batch in batches:
            labels = supervised_labels(batch)
            index = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
            segment = segments(batch).flatten()[index]
            positions.append(index)
            shapes.append(labels.shape)
            counts.append(torch.unique_consecutive(segment, return_counts=True)[1])
        ends = torch.cat(counts).cumsum(0)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        numbers = tuple(count.numel() for count in counts)
        return cls(tuple(positions), tuple(shapes), cu_seqlens, numbers)

    @property
    def count(self) -> int:
        return sum(index.numel() for index in self.positions)

    def packed(self, values: Sequence[Tensor]) -> Tensor:
        """[N] out of one tensor for each batch, shaped like its labels."""
        pairs = zip(values, self.positions, strict=True)
        return torch.cat([value.flatten()[index] for value, index in pairs])

    def unpacked(self, packed: Tensor) -> list[Tensor]:
        """The inverse of :meth:`packed`, 0 where not supervised."""
        parts = packed.split([index.numel() for index in self.positions])
        return [
            part.new_zeros(shape.numel()).index_copy(0, index, part).view(shape)
            for part, index, shape in zip(parts, self.positions, self.shapes, strict=True)
        ]


def segments(batch: Mapping[str, Any]) -> Tensor:
    """The trajectory that each token [B, T] belongs to, numbered from 0 within the batch."""
    starts = segment_starts(batch)
    return (starts.flatten().cumsum(0) - 1).view(starts.shape)
