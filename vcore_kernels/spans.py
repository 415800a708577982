"""Named spans, so that a profile says what time went into: ``vcore::NAME`` for every public
operator and every phase of a training step.

A span is ``torch.profiler.record_function`` while a PyTorch profiler runs (under
``torch.autograd.profiler.emit_nvtx`` an NVTX range) and a scope of Triton's Proton while that one
runs. Without either, and inside ``torch.compile``, it is nothing.
"""

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ParamSpec, TypeVar

from torch.autograd import _profiler_enabled
from torch.compiler import is_dynamo_compiling
from torch.profiler import record_function

P = ParamSpec("P")
R = TypeVar("R")
PREFIX = "vcore::"
_NOTHING = nullcontext()
_modules = sys.modules


def _proton_runs() -> bool:
    flags = _modules.get("triton.profiler.flags")  # nobody starts Proton without importing it
    return flags is not None and flags.flags.profiling_on


def _recorded() -> bool:
    return _profiler_enabled() or _proton_runs()


class _Span:
    __slots__ = ("_inside", "_name")

    def __init__(self, name: str):
        self._name = name
        self._inside: ExitStack | None = None

    def __enter__(self) -> None:
        if not _recorded():
            return
        with ExitStack() as both:
            if _profiler_enabled():
                both.enter_context(record_function(PREFIX + self._name))
            if _proton_runs():
                from triton import profiler as proton

                both.enter_context(proton.scope(PREFIX + self._name))
            self._inside = both.pop_all()  # not reached where one raises: the other is left then

    def __exit__(self, *error: Any) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.__exit__(*error)


def span(name: str) -> AbstractContextManager[None]:
    """Context manager: the block is the span ``vcore::<name>`` in every profile that is taken.

    It begins where the block does. One object serves one block at a time.
    """
    return _NOTHING if is_dynamo_compiling() else _Span(name)


def spanned(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: each call of ``function`` is a span with its name."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_dynamo_compiling() or not _recorded():  # there a constant: no more is traced
            return function(*args, **kwargs)
        with span(name):
            return function(*args, **kwargs)

    return call
