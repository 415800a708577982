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
from typing import ParamSpec, TypeVar

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
    if is_dynamo_compiling():  # there a constant: what follows is not traced
        return False
    return _profiler_enabled() or _proton_runs()


def span(name: str) -> AbstractContextManager:
    """Context manager: the block is the span ``vcore::<name>`` in every profile that is taken."""
    if not _recorded():
        return _NOTHING
    both = ExitStack()
    if _profiler_enabled():
        both.enter_context(record_function(PREFIX + name))
    if _proton_runs():
        from triton import profiler as proton

        both.enter_context(proton.scope(PREFIX + name))
    return both


def spanned(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: each call of ``function`` is a span with its name."""
    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _recorded():
            return function(*args, **kwargs)
        with span(name):
            return function(*args, **kwargs)

    return call
