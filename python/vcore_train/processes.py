"""What the processes that share an optimizer step tell each other: sums and short vectors."""

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """A process group; without one (``group=None``) a process alone, which waits for nobody.

    Every process of the group calls the same methods in the same order. The group is not kept
    alive: where one lives until Python exits, gloo's threads do too, and the process may abort.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = None if group is None else weakref.ref(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """RuntimeError where it has been destroyed."""
        if self._group is None:
            return None
        group = self._group()
        if group is None:
            raise RuntimeError(
                "Processes: the process group was destroyed. Make one for the new group."
            )
        return group

    @classmethod
    def all(cls) -> "Processes":
        """All processes that were started together (by torchrun, by accelerate)."""
        ready = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.group.WORLD if ready else None)

    @property
    def count(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on each of them."""
        if self.group is None:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """In place; one collective for each tensor."""
        if self.group is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)

    def gather(self, rows: Tensor) -> list[Tensor]:
        """``rows`` [n, ...] of every process in the order of their ranks; n may differ.

        Two collectives: the lengths, and the rows padded to the longest.
        """
        if self.group is None:
            return [rows]
        length = torch.tensor([rows.shape[0]], device=rows.device)
        lengths = [torch.empty_like(length) for _ in range(self.count)]
        dist.all_gather(lengths, length, group=self.group)
        longest = int(torch.stack(lengths).max())
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(parts, padded, group=self.group)
        return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]
