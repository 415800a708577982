"""Ctrl-C during training: finish the step, save, stop. SIGTERM, as launchers send it, too."""

import signal
import threading
import time
from types import FrameType

import torch
from rich.console import Console
from transformers import TrainerCallback

from vcore_train.launch import launched
from vcore_train.processes import Processes

# A launcher passes a signal on to processes that have had it from the terminal or from the
# scheduler too: within so many seconds it is the same one.
SAME_SIGNAL = 3.0


class StopAtInterrupt(TrainerCallback):
    """A context manager and trainer callback for the signals SIGINT and SIGTERM.

    The first signal lets the current optimizer step finish, asks for a checkpoint and ends the
    training; ``requested`` says that this process got one. A second one interrupts at once. Outside
    the main thread, where Python delivers no signals, it does nothing.

    Of several processes all stop after the same step, whichever got the signal: each step ends with
    a sum over the processes.
    """

    def __init__(self, console: Console):
        self.console = console
        self.requested = False
        self._since = 0.0

    def __enter__(self) -> "StopAtInterrupt":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {
                number: signal.signal(number, self._on_signal)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self._since = time.monotonic()
            again = "press Ctrl-C again" if number == signal.SIGINT else "send the signal again"
            self.console.print(f"Stopping after this step; {again} to stop at once.")
        elif not launched() or time.monotonic() - self._since > SAME_SIGNAL:
            self.console.print("Stopped at once; checkpoints saved before are whole.")
            raise KeyboardInterrupt

    def requested_anywhere(self, device: torch.device) -> bool:
        """Whether any process got a signal; all of them ask, and get the same answer."""
        processes = Processes.all()
        if processes.group is None:
            return self.requested
        return bool(processes.sum(torch.tensor(float(self.requested), device=device)) > 0)

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested_anywhere(args.device):
            control.should_save = True
            control.should_training_stop = True
