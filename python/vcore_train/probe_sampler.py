"""Which training examples make up the probe batches."""

import torch
from torch import Tensor


class ProbeSampler:
    """Draws example numbers with a generator of its own, which leaves the data order alone.

    Args:
        size: examples to draw from.
        replacement: draw each batch anew from all examples (within a batch too, as the released
            code does), or go through them in random order before any comes again.
        seed: of the generator.
    """

    def __init__(self, size: int, *, replacement: bool, seed: int):
        self.size, self.replacement = size, replacement
        self.generator = torch.Generator().manual_seed(seed)
        self.remaining = torch.empty(0, dtype=torch.int64)

    def draw(self, count: int) -> list[int]:
        if self.replacement:
            return torch.randint(self.size, (count,), generator=self.generator).tolist()
        while self.remaining.numel() < count:
            order = torch.randperm(self.size, generator=self.generator)
            self.remaining = torch.cat([self.remaining, order])
        drawn, self.remaining = self.remaining[:count], self.remaining[count:].clone()
        return drawn.tolist()

    def state(self) -> dict[str, Tensor]:
        return {
            "generator": self.generator.get_state(),
            "remaining": self.remaining,
            "size": torch.tensor(self.size),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        if int(state["size"]) != self.size:
            raise ValueError(
                f"the checkpoint drew probe batches from {int(state['size'])} examples, and the "
                f"training set has {self.size}. Resume with the same training set."
            )
        self.generator.set_state(state["generator"])
        self.remaining = state["remaining"]
