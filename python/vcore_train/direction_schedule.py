"""The descent direction over a run: when it is taken anew, what of it a checkpoint keeps."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vcore_train.checkpoint import under_prefix, with_prefix
from vcore_train.config import VcoreOptions
from vcore_train.direction_states import KINDS, DirectionState, EmaDirection
from vcore_train.directions import Batch, Direction, read_direction, update_direction
from vcore_train.processes import Processes

logger = logging.getLogger(__name__)


class DirectionSchedule:
    """Updates g every ``args.every`` optimizer steps and keeps it in between.

    Args:
        processes: those that share the probe batches, where each has a whole copy of the model.
    """

    def __init__(self, args: VcoreOptions, processes: Processes | None = None):
        self.args, self.processes = args, processes
        self._averaged = args.direction == EmaDirection.kind
        self.state: DirectionState = (
            EmaDirection(args.ema_decay) if self._averaged else KINDS[args.direction]()
        )
        self._taken_at: int | None = None

    def direction(
        self,
        step: int,
        model: nn.Module,
        optimizer: Any,
        probe_batches: Callable[[int], Iterable[Batch]],
    ) -> Direction:
        """g for optimizer step ``step``, for reading only.

        ``probe_batches(count)`` gives so many probe batches; it is called only where g is updated,
        and read only where that takes a gradient. Preconditioning uses the second moment of now.

        Raises NonFiniteDirectionError where the averaged direction meets NaN or infinity.
        """
        args, state = self.args, self.state
        if self._taken_at is None or step - self._taken_at >= args.every:
            self._taken_at = None
            count = args.ema_warmup if self._averaged and not state.updates else 1
            update_direction(
                state,
                model,
                probe_batches(count),
                optimizer=optimizer,
                params=args.direction_choice,
                max_norm=args.probe_max_norm,
                weight=count,
                processes=self.processes,
            )
            self._taken_at = step
        direction = read_direction(
            state, model, optimizer=optimizer, precondition=args.direction_precondition
        )
        if args.every == 1 and not self._averaged:  # no later step uses it
            state.tensors, self._taken_at = {}, None
        return direction

    def forget(self) -> None:
        """The next step updates g."""
        self._taken_at = None

    def state_dict(self) -> tuple[Direction, dict[str, Any]]:
        """Tensors and values for a checkpoint, without a direction that no later step uses."""
        values = self.state.state_dict()
        tensors = values.pop("tensors")
        return with_prefix("direction", tensors), {
            "direction": values,
            "direction_taken_at": self._taken_at,
            "direction_params": self.args.direction_choice,
        }

    def load_state_dict(
        self, tensors: Direction, values: dict[str, Any], device: torch.device
    ) -> None:
        """Continues where :meth:`state_dict` was taken, an average with the decay of now.

        A direction of another kind, or of other parameters, starts anew.
        """
        state = values["direction"]
        if state["kind"] != self.state.kind:
            logger.warning(
                "The checkpoint's direction is of kind %r; direction=%r starts anew.",
                state["kind"],
                self.state.kind,
            )
            return
        params = values.get("direction_params", self.args.direction_choice)
        if params != self.args.direction_choice:
            logger.warning(
                "The checkpoint's direction is of the parameters %r; direction_params=%r starts "
                "anew.",
                params,
                self.args.direction_choice,
            )
            return
        self._taken_at = values["direction_taken_at"]
        kept = {
            n: t if isinstance(t, DTensor) else t.to(device)
            for n, t in under_prefix("direction", tensors).items()
        }
        self.state.load_state_dict({**state, "tensors": kept})
        if isinstance(self.state, EmaDirection):
            self.state.decay = self.args.ema_decay
