"""Rewards for answers: verifiers, and the processes that run them on answers of any kind.

A verifier is a function (response, reference answer) -> reward. Model output can make a check
hang, also inside C code that no signal interrupts, exhaust the memory or crash the interpreter
(``9**9**9`` in a box is enough), so :class:`Verification` runs verifiers in processes that it can
kill: such an answer costs its own reward and nothing else.
"""

import importlib.util
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import ModuleType
from typing import NamedTuple

import cloudpickle

from vcore_train.answers import bare, final_answer, normalised

Verifier = Callable[[str, str], float | bool]

START_SECONDS = 120.0  # for a worker to start and load the verifier
LONGEST_WAIT = 60.0  # seconds; the operating system's own limit is an integer of milliseconds

# Gives a worker the parent's search path, without the working directory that ``-m`` would add.
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from vcore_train.verifying import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


def exact_match(response: str, answer: str) -> float:
    """1.0 where the response's final answer is spelt like ``answer``, otherwise 0.0.

    ``answer`` is the reference's final answer, not its solution. Both are normalised first (see
    :mod:`vcore_train.answers`); an empty answer matches nothing. Takes linear time.
    """
    found = final_answer(response)
    return float(found is not None and normalised(found) == normalised(answer) != "")


def math_verify_match(response: str, answer: str) -> float:
    """1.0 where the response's answer equals ``answer`` as mathematics, otherwise 0.0.

    By the package math-verify. Both are read as LaTeX, without need of dollar signs. A response
    without a final answer (see :func:`vcore_train.answers.final_answer`) is searched by
    math-verify itself, which takes the last expression it finds. Answers that
    :func:`exact_match` accepts are accepted without it.

    An answer that cannot be parsed earns 0.0. One that is hard to evaluate, as ``9**9**9`` is,
    can take forever: run this function through :class:`Verification`.
    """
    if exact_match(response, answer):
        return 1.0
    library = _math_verify()
    found = final_answer(response)
    reference = library.parse(_boxed(answer), parsing_timeout=None)
    given = library.parse(response if found is None else _boxed(found), parsing_timeout=None)
    return float(library.verify(reference, given, timeout_seconds=None))


@cache
def _math_verify() -> ModuleType:
    import math_verify  # slow to import, and an optional dependency

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of its disabled timeouts
    return math_verify


def _boxed(answer: str) -> str:
    return rf"\boxed{{{bare(answer)}}}"


VERIFIERS: dict[str, Verifier] = {"exact": exact_match, "math-verify": math_verify_match}


class Verdict(NamedTuple):
    """The reward of one answer, and what went wrong where its verifier gave none."""

    reward: float  # finite; 0.0 with a problem
    problem: str | None = None  # "timeout", "worker died (...)", "returned ..." or "Error: message"


class Verification:
    """A verifier at work: a context manager whose :meth:`judge` gives each answer its verdict.

    ``exact`` runs in this process. Every other verifier runs in worker processes, which start
    when they are first needed and stay until :meth:`close`. They do not import this program's
    main module, print nothing, and end with this process, however it ends. A check past
    ``seconds`` has its worker and all that the worker started killed.

    Not for use from several threads at once.

    Args:
        verifier: a name in :data:`VERIFIERS`, or a function (response, reference answer) ->
            reward. A function travels by cloudpickle, so a lambda or a closure will do. What it
            imports when called counts toward its first answer's time.
        seconds: wall-clock limit of one check.
        workers: most processes at a time; by default one for each CPU up to 4.

    Raises ValueError for an unknown name, a function that cannot be pickled, a missing package
    or a bad limit; TypeError for a verifier that is neither a name nor a function.
    """

    def __init__(
        self, verifier: str | Verifier, *, seconds: float = 5.0, workers: int | None = None
    ):
        if not 0 < seconds < math.inf:
            raise ValueError(f"Verification: seconds must be positive and finite, got {seconds}.")
        if workers is not None and workers < 1:
            raise ValueError(f"Verification: workers must be at least 1, got {workers}.")
        self.verifier = _resolve(verifier)
        self.seconds = seconds
        self.workers = workers or min(4, os.cpu_count() or 1)
        self._in_process = self.verifier is exact_match
        self._first_message = None if self._in_process else _first_message(self.verifier)
        self._running: list[_Worker] = []

    def __enter__(self) -> "Verification":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. Harmless when repeated; a later :meth:`judge` starts new ones."""
        self._end_all()

    def judge(
        self, pairs: Sequence[tuple[str, str]], advance: Callable[[], None] | None = None
    ) -> list[Verdict]:
        """The verdicts on ``pairs`` of (response, reference answer), in their order.

        ``advance`` is called after each answer. Left by an exception, Ctrl-C for instance, it
        ends all workers, so that no check goes on; the next call starts new ones.

        Raises RuntimeError where a worker cannot start.
        """
        verdicts: dict[int, Verdict] = {}
        judged = self._here(pairs) if self._in_process else self._in_workers(pairs)
        try:
            for place, verdict in judged:
                verdicts[place] = verdict
                if advance is not None:
                    advance()
        except BaseException:
            self._end_all()
            raise
        return [verdicts[place] for place in range(len(pairs))]

    def _here(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Verdict]]:
        for place, (response, answer) in enumerate(pairs):
            yield place, Verdict(float(self.verifier(response, answer)))

    def _in_workers(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Verdict]]:
        """Hands out the pairs; yields their places and verdicts as they come."""
        for worker in [w for w in self._running if w.process.poll() is not None]:
            self._end(worker)  # it died while it had nothing to do
        waiting = deque(enumerate(pairs))
        while waiting or any(w.place is not None for w in self._running):
            self._hand_out(waiting)
            active = [w for w in self._running if w.deadline < math.inf]
            left = min(w.deadline for w in active) - time.monotonic()
            wait([w.connection for w in active], timeout=min(max(left, 0.0), LONGEST_WAIT))
            for worker in active:
                verdict = self._news(worker)
                if verdict is None:
                    continue
                place, worker.place, worker.deadline = worker.place, None, math.inf
                if place is not None:
                    yield place, verdict
                elif verdict.problem is not None:
                    raise RuntimeError(
                        f"Verification: a worker could not load the verifier: {verdict.problem}. "
                        "It shares sys.path and the environment with this program, but none of its "
                        "objects: put the verifier into a module that can be imported by itself."
                    )
                else:
                    worker.ready = True

    def _hand_out(self, waiting: deque[tuple[int, tuple[str, str]]]) -> None:
        """Gives pairs to idle workers, and starts workers for those that are left."""
        for worker in self._running:
            if waiting and worker.ready and worker.place is None:
                worker.place, pair = waiting.popleft()
                worker.send(pair, self.seconds)
        starting = sum(not worker.ready for worker in self._running)
        for _ in range(min(len(waiting) - starting, self.workers - len(self._running))):
            assert self._first_message is not None
            worker = _Worker()
            self._running.append(worker)
            worker.send(self._first_message, START_SECONDS)

    def _news(self, worker: "_Worker") -> Verdict | None:
        """What has become of the worker's task; None while it goes on."""
        if worker.connection.poll():
            try:
                return Verdict(*worker.connection.recv())
            except (EOFError, ConnectionError):
                code = self._end(worker)
                cause = f"signal {-code}" if code < 0 else f"exit code {code}"
                return Verdict(0.0, f"worker died ({cause})")
        if time.monotonic() < worker.deadline:
            return None
        self._end(worker)
        return Verdict(0.0, "timeout")

    def _end(self, worker: "_Worker") -> int:
        code = worker.end()
        self._running.remove(worker)
        return code

    def _end_all(self) -> None:
        while self._running:
            self._end(self._running[-1])


class _Worker:
    """A process of :mod:`vcore_train.verifying`, and what it is at work on."""

    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        lifeline, self.lifeline = Pipe(duplex=False)  # nothing passes through it: see verifying
        descriptors = theirs.fileno(), lifeline.fileno()
        with theirs, lifeline:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *map(str, (*descriptors, *sys.path))],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C does not reach it, and its children end with it
            )
        self.ready = False  # has loaded the verifier
        self.place: int | None = None  # of the pair that it checks
        self.deadline = math.inf  # of the reply, on the clock of time.monotonic

    def send(self, message: object, seconds: float) -> None:
        """Sends what the worker is to reply to within ``seconds``."""
        with suppress(ConnectionError):  # it has died, and its connection will say so
            self.connection.send(message)
        self.deadline = time.monotonic() + seconds

    def end(self) -> int:
        """Kills the process and its children; returns its exit code, negative for a signal.

        Of a process that has ended by itself, the code is its own.
        """
        with suppress(ProcessLookupError):  # nothing is left of the group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        self.lifeline.close()
        return self.process.wait()


def _resolve(verifier: str | Verifier) -> Verifier:
    if isinstance(verifier, str):
        if verifier not in VERIFIERS:
            raise ValueError(
                f"Verification: no verifier is named {verifier!r}. Expected one of "
                f"{', '.join(VERIFIERS)}, or a function (response, answer) -> reward."
            )
        verifier = VERIFIERS[verifier]
    if not callable(verifier):
        raise TypeError(
            "Verification: expected a verifier's name or a function (response, answer) -> reward, "
            f"got {type(verifier).__name__}."
        )
    if verifier is math_verify_match and importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "Verification: the verifier math-verify needs the package of that name. Install it "
            "with pip install math-verify."
        )
    return verifier


def _first_message(verifier: Verifier) -> tuple[list[str], bytes]:
    """Modules to import before the first check, and the pickled verifier."""
    try:
        pickled = cloudpickle.dumps(verifier)
    except Exception as error:
        raise ValueError(
            f"Verification: the verifier cannot be sent to another process ({error}). Open files, "
            "models and locks inside the function instead of taking them from around it."
        ) from error
    return ["math_verify"] if verifier is math_verify_match else [], pickled
