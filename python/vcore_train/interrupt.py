"""Ctrl-C during training: finish the step, save, stop."""

import signal
import threading
from types import FrameType

from rich.console import Console
from transformers import TrainerCallback


class StopAtInterrupt(TrainerCallback):
    """A context manager and trainer callback for the interrupt signal.

    The first signal lets the current optimizer step finish, asks for a checkpoint and ends the
    training; ``requested`` says that it happened. A second one interrupts at once. Outside the main
    thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self, console: Console):
        self.console = console
        self.requested = False

    def __enter__(self) -> "StopAtInterrupt":
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self.console.print("Stopped at once; checkpoints saved before are whole.")
            raise KeyboardInterrupt
        self.requested = True
        self.console.print("Stopping after this step; press Ctrl-C again to stop at once.")

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
