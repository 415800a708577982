"""The worker process of :class:`vcore_train.verifiers.Verification`.

The first message names modules to import and holds the pickled verifier; each later one is a pair
(response, reference answer). Every reply is a pair (reward, problem), that to the first message
once the verifier is loaded.
"""

import fcntl
import importlib
import math
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LONGEST_PROBLEM = 200  # characters
LARGEST_REWARD = 3e38  # of float32, in which losses are computed

Reply = tuple[float, str | None]


def main(connection: int, lifeline: int) -> None:
    """Serves the process at the other end of the two file descriptors until it goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with suppress(OSError):  # out of memory, the kernel is to kill this process, not the parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    _die_with(lifeline)
    with suppress(EOFError, ConnectionError):  # the parent is gone, or has closed its end
        _serve(Connection(connection))
    os._exit(0)  # threads that a verifier has left must not keep the process


def _die_with(lifeline: int) -> None:
    """Has the kernel end this process and its children when the other end of a pipe closes.

    That happens however the parent ends, and interrupts C code too: the signal is left to its
    default action. The parent has started this process as the leader of a process group.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _serve(connection: Connection) -> None:
    modules, pickled = connection.recv()
    try:
        for module in modules:
            importlib.import_module(module)
        verifier = pickle.loads(pickled)
    except BaseException as error:
        connection.send((0.0, describe(error)))
        return
    connection.send((0.0, None))
    while True:
        connection.send(check(verifier, *connection.recv()))


def check(verifier: Callable[[str, str], Any], response: str, answer: str) -> Reply:
    """The verifier's reward, or 0.0 and why there is none. Catches everything, SystemExit too."""
    try:
        returned = verifier(response, answer)
        reward = _number(returned)
        if abs(reward) <= LARGEST_REWARD:  # false for NaN
            return reward, None
        return 0.0, _one_line(f"returned {returned!r}")
    except BaseException as error:
        return 0.0, describe(error)


def _number(value: Any) -> float:
    """What float() makes of booleans and scalars of any library; NaN for anything else."""
    if isinstance(value, str | bytes | bytearray):  # float() would read it
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def describe(error: BaseException) -> str:
    """``ErrorType: message`` on one line; the type alone where there is no message."""
    kind = type(error).__name__
    try:
        message = str(error)
    except Exception:
        message = ""
    return _one_line(f"{kind}: {message}" if message else kind)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_PROBLEM]
