"""Measuring calls on one device: interleaved rounds, memory, fresh memory that shows.

A dry run (a CPU under Triton's interpreter) goes the same way and measures nothing.
"""

import contextlib
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
# Zeroed before every timed call: more than any cache holds, and long enough for the host to queue
# the call behind it, so that its launches do not count.
FLUSH_BYTES = 1 << 30


@dataclass
class Times:
    """Milliseconds of one subject, a number for each round, and of the yardstick in the same
    rounds.
    """

    rounds: list[float]
    unit: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        ordered = sorted(self.rounds)
        return ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]

    @property
    def units(self) -> float:
        """Median over the rounds of the time in units of the yardstick's."""
        return statistics.median(a / b for a, b in zip(self.rounds, self.unit, strict=True))


@dataclass
class Figure:
    """One line of a table. Whatever was not measured is None."""

    section: str
    shape: str
    subject: str
    unit: str = ""  # the yardstick that `units` counts
    ms: float | None = None
    ms_quartiles: tuple[float, float] | None = None
    units: float | None = None
    percent_of_ceiling: float | None = None
    ceiling: str = ""  # which one
    extra_bytes: int | None = None  # peak beyond inputs and results
    share_of_logits: float | None = None  # extra_bytes over those of the bf16 logits
    gate: str = ""  # how the results were checked, with the errors
    note: str = ""


@dataclass
class Bench:
    """Where and how to measure, and what has been found."""

    device: torch.device
    dry: bool
    rounds: int
    deadline: float  # time.monotonic() after which nothing new is begun
    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of our own results against the truth
    ceilings: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it is not here
    on_figures: Callable[["Bench"], None] = lambda bench: None  # writes the files so far

    def add(self, figures: Iterable[Figure]) -> None:
        self.figures.extend(figures)
        self.on_figures(self)

    def late(self) -> bool:
        return not self.dry and time.monotonic() > self.deadline

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(
        self, subjects: Mapping[str, Call], unit: str, seconds: float = 8.0
    ) -> dict[str, Times]:
        """Every subject once a round, in an order drawn anew; ``unit`` is the yardstick's name.

        Stops after the bench's number of rounds, or after ``seconds`` once there are five.
        """
        for _ in range(1 if self.dry else 2):
            for call in subjects.values():
                call()
        self.synchronize()
        if self.dry:
            return {}
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        order = list(subjects)
        shuffle = random.Random(0).shuffle
        rounds: list[dict[str, float]] = []
        begin = time.monotonic()
        while len(rounds) < self.rounds and (len(rounds) < 5 or time.monotonic() - begin < seconds):
            shuffle(order)
            events = {}
            for name in order:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                subjects[name]()
                end.record()
                events[name] = start, end
            self.synchronize()
            rounds.append({name: a.elapsed_time(b) for name, (a, b) in events.items()})
        return {
            name: Times([r[name] for r in rounds], [r[unit] for r in rounds]) for name in subjects
        }

    def peak_extra(self, call: Call) -> int | None:
        """Bytes allocated at the highest point of the call beyond what stood before and what it
        returns.
        """
        if self.dry:
            call()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        result = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        return peak - sum(tensor.nbytes for tensor in tensors_in(result))

    def poison(self, size: int) -> None:
        """Leaves NaN in memory that the next allocations reuse: an unwritten entry shows."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            size = min(size, free // 2)
        blocks = [
            torch.full((part // 4,), torch.nan, device=self.device)
            for part in (size // 2, size // 4, size // 8, 1 << 20, 1 << 16, 1 << 9)
        ]
        self.synchronize()
        del blocks

    def graphed(self, call: Call) -> Call:
        """``call`` as a CUDA graph, so that the host's part of it does not count."""
        if self.device.type != "cuda":
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts; of each storage the largest."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    if not isinstance(result, Sequence) or isinstance(result, str):
        return []
    inside = sorted((t for part in result for t in tensors_in(part)), key=lambda t: t.nbytes)
    return list({t.untyped_storage().data_ptr(): t for t in inside}.values())


def timed_figure(figure: Figure, times: Times | None) -> Figure:
    if times is not None:
        figure.ms, figure.ms_quartiles, figure.units = times.median, times.quartiles, times.units
    return figure


# ---- memory on a CPU ----


def resident_peak(call: Call) -> int | None:
    """How far the memory of this process rose during the call, less what the call returns.

    Resident memory sees every allocator, a BLAS's workspace too. None where Linux's counters are
    not to be had.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what the heap keeps would hide as much of the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident_bytes("VmRSS")
        result = call()
        peak = _resident_bytes("VmHWM") - before
    except OSError:
        return None
    return max(0, peak - sum(tensor.nbytes for tensor in tensors_in(result)))


def _resident_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def allocated_peak(call: Call) -> int:
    """The same from PyTorch's own allocator: every tensor, exact also where it is small, but not
    what other allocators hand out.
    """
    from vcore_train.experiments.measuring import peak_bytes

    kept = []
    peak = peak_bytes(lambda: kept.append(call()))
    return max(0, peak - sum(tensor.nbytes for tensor in tensors_in(kept)))
