"""The descent direction over a run: when it is taken anew, what of it a checkpoint keeps."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from vcore_train.checkpoint import under_prefix, with_prefix
from vcore_train.config import VcoreConfig
from vcore_train.directions import Batch, Direction, EmaDirection, Kind, descent_direction


class DirectionSchedule:
    """Takes g every ``args.every`` optimizer steps and keeps it in between."""

    def __init__(self, args: VcoreConfig):
        self.args = args
        self._ema = EmaDirection(args.ema_decay) if args.direction == "ema" else None
        self._kept: Direction | None = None
        self._taken_at = 0

    def direction(
        self, step: int, model: nn.Module, optimizer: Any, probe_batches: Iterable[Batch]
    ) -> Direction:
        """g for optimizer step ``step``; ``probe_batches`` are read only where it is taken anew.

        Raises NonFiniteDirectionError where the averaged direction meets NaN or infinity.
        """
        if self._kept is None or step - self._taken_at >= self.args.every:
            self._kept, self._taken_at = None, step
            self._kept = descent_direction(
                model,
                probe_batches,
                kind=cast(Kind, self.args.direction),
                optimizer=optimizer,
                ema=self._ema,
                max_norm=self.args.probe_max_norm,
            )
        return self._kept

    def forget(self) -> None:
        """The next step takes a fresh direction."""
        self._kept = None

    def state(self) -> tuple[Direction, dict[str, Any]]:
        """Tensors and values for a checkpoint, without a direction that no later step uses."""
        tensors: Direction = {}
        values: dict[str, Any] = {"direction_taken_at": self._taken_at}
        if self._ema is not None:
            ema = self._ema.state_dict()
            tensors |= with_prefix("ema", ema.pop("average"))
            values["ema"] = ema
        if self.args.every > 1 and self._kept is not None:
            tensors |= with_prefix("direction", self._kept)
        return tensors, values

    def load_state(self, tensors: Direction, values: dict[str, Any], device: torch.device) -> None:
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._taken_at = values["direction_taken_at"]
        self._kept = under_prefix("direction", tensors) or None
        if self._ema is not None and "ema" in values:
            self._ema.load_state_dict({**values["ema"], "average": under_prefix("ema", tensors)})
