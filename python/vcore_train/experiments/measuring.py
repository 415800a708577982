"""Time and memory of calls on a CPU, measured so that a busy machine changes little."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

Calls = Mapping[str, Callable[[], Any]]


def one_round(calls: Calls) -> dict[str, float]:
    """Seconds of each call, made once, in turn.

    Ratios of times in one round are what compares: whatever slows the machine slows all of them.
    """
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that was live at once during ``call``, beyond what was before it.

    From the profiler's record of PyTorch's CPU allocator: every tensor, those inside the compiled
    kernels too, but not what other allocators hand out (Python objects, a BLAS's own workspace).
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    assert record.profiler is not None
    results = record.profiler.kineto_results
    assert results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes):
        live += change
        peak = max(peak, live)
    return peak
