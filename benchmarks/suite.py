"""How the suite measures one subject: the gate, memory, then rounds beside a yardstick.

The tests of ``bench_*.py`` describe a subject and hand it to the ``bench`` fixture; what comes of
it goes into pytest-benchmark's tables and into a :class:`vcore_train.bench_record.Record`.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from vcore_train.bench_record import Growth, Record, Row

from benchmarks.measure import Call, allocated_peak, resident_peak, tensors_in
from benchmarks.peers import Absent, foreign_errors

ROUNDS, QUICK_ROUNDS = 7, 2
SECONDS = 2.0  # of a subject and its yardstick, all rounds together, where they are not few
Check = Callable[[Any], str]  # of a call's result: the errors; AssertionError where they are wrong
Memory = Literal["resident", "allocator"]


class Bench:
    """The ``bench`` fixture: pytest-benchmark's fixture, the device, and the record.

    ``late``: the suite has taken so long that subjects get the fewest rounds from here on.
    """

    def __init__(
        self, benchmark: Any, record: Record, device: torch.device, units: dict, late: bool
    ):
        self.benchmark, self.record, self.device, self.late = benchmark, record, device, late
        self.quick = record.quick
        self.units: dict[tuple[str, str], Row] = units

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - start

    def measure(
        self,
        row: Row,
        make: Callable[[], Call],
        unit: Call,
        check: Check,
        *,
        unit_row: Row | None = None,
        memory: Memory | None = None,
        before: Call | None = None,
        cold: Call | None = None,
        once: bool = False,
    ) -> Row:
        """Checks ``make()`` and times it; everything found stands in ``row``.

        Args:
            row: what the subject is. Of a peer, what keeps it from running is recorded and skips
                the test, and so does a wrong result; of ours, both fail it.
            unit: the yardstick; ``unit_row`` describes it where it is more than that.
            memory: how the peak is measured, in a call of its own.
            before: runs untimed ahead of each call, ``cold`` ahead of the one whose memory is
                measured.
            once: one call is gate, memory and time together: for what is tens of times slower than
                the others, and compiles nothing.
        """
        self.benchmark.group = row.group
        self.benchmark.has_error = (
            True  # until it is used: where the gate stops the test, it is not
        )
        with warnings.catch_warnings() if row.kind == "peer" else nullcontext():
            if row.kind == "peer":  # what other libraries warn of is theirs
                warnings.simplefilter("ignore")
            call = self._run(row, make)
            if once:
                self._measure_once(row, call, unit, check, unit_row)
                return row
            self._check(row, check, self._run(row, lambda: self._after(before, call)))
            seconds = math.inf
            if memory is not None:
                if cold is not None:
                    cold()
                start = time.perf_counter()
                row.extra_bytes = self.peak(call, memory, before)
                seconds = time.perf_counter() - start
            if memory != "resident" and not self.quick:  # a profiler takes time of its own
                seconds = self.seconds(lambda: self._after(before, call))
            self._time(row, call, unit, before, seconds, unit_row)
        return row

    @staticmethod
    def _after(before: Call | None, call: Call) -> Any:
        if before is not None:
            before()
        return call()

    def _run(self, row: Row, what: Callable[[], Any]) -> Any:
        """``what()``; a peer that cannot is absent."""
        try:
            result = what()
            self.synchronize()
        except foreign_errors() as error:
            if row.kind == "ours":
                raise
            reason = str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}"
            row.status, row.note = "absent", " ".join(reason.split())[:200]
            self.record.add(row)
            pytest.skip(f"{row.subject}: {row.note}")
        return result

    def _check(self, row: Row, check: Check, result: Any) -> None:
        """The gate."""
        self.record.add(row)
        try:
            row.gate = check(result)
        except AssertionError as error:
            row.status, row.gate = "wrong", " ".join(str(error).split())[:200]
            if row.kind == "ours":
                raise
            pytest.xfail(f"{row.subject} is wrong: {row.gate}")

    def peak(self, call: Call, memory: Memory, before: Call | None = None) -> int | None:
        """Bytes at the highest point beyond what stood before and what is returned."""
        if before is not None:
            before()
        if self.device.type == "cuda":
            return _peak_on_gpu(self.device, call)
        return resident_peak(call) if memory == "resident" else allocated_peak(call)

    def _measure_once(
        self, row: Row, call: Call, unit: Call, check: Check, unit_row: Row | None
    ) -> None:
        results: list[Any] = []
        found: list[float] = []
        units: list[float] = []

        def measured() -> Any:
            results.append(call())
            return results[-1]

        def timed() -> None:
            start = time.perf_counter()
            row.extra_bytes = self._run(row, lambda: self.peak(measured, "resident"))
            if not results:  # no counters here
                self._run(row, measured)
            found.append(time.perf_counter() - start)

        def setup() -> None:
            units.append(self.seconds(unit))

        self.benchmark.pedantic(timed, setup=setup)
        self._check(row, check, results[-1])
        if not self.benchmark.disabled:
            row.seconds, row.unit_seconds, row.status = found, units, "measured"
            self._add_unit(row, unit_row)

    def _time(
        self,
        row: Row,
        call: Call,
        unit: Call,
        before: Call | None,
        seconds: float,
        unit_row: Row | None,
    ) -> None:
        """Rounds of the unit and the call, as many as some seconds hold, but at least three (of a
        slow call fewer, once it is late).
        """
        if self.benchmark.disabled:
            self.benchmark.pedantic(call, setup=before)
            return
        units: list[float] = []

        def setup() -> None:
            units.append(self.seconds(unit))
            if before is not None:
                before()
                self.synchronize()

        def timed() -> None:
            call()
            self.synchronize()

        setup()
        least = 1 if self.late and seconds > 1 else 3
        fit = 0 if self.late else int(SECONDS / max(seconds + units[-1], 1e-9))
        rounds = QUICK_ROUNDS if self.quick else min(ROUNDS, max(fit, least))
        warmups = 1 if seconds < 1 else 0
        self.benchmark.pedantic(timed, setup=setup, rounds=rounds, warmup_rounds=warmups)
        row.seconds = list(self.benchmark.stats.stats.data)
        row.unit_seconds = units[-rounds:]
        row.status = "measured"
        self.benchmark.extra_info |= {
            "unit": row.unit,
            "x unit": row.units,
            "extra MiB": None if row.extra_bytes is None else row.extra_bytes / 2**20,
        }
        self._add_unit(row, unit_row)

    def _add_unit(self, row: Row, unit_row: Row | None) -> None:
        """The yardstick's own row, which gathers the rounds of all subjects of the group."""
        if not row.unit:
            return
        known = self.units.get((row.group, row.unit))
        if known is None:
            known = unit_row or Row(row.group, row.unit, "yardstick")
            known.status, known.unit, known.ceiling = "measured", row.unit, row.ceiling
            self.units[row.group, row.unit] = known
            self.record.add(known)
        known.seconds += row.unit_seconds
        known.unit_seconds += row.unit_seconds

    def grow(
        self,
        problem: str,
        subject: str,
        kind: Literal["ours", "peer"],
        axis: str,
        calls: Mapping[int, Call],
    ) -> None:
        """How time and memory grow with ``axis``: all sizes take turns in each round."""
        self.benchmark.group = f"growth: {problem}, {axis}"
        peaks = []
        with nullcontext() if kind == "ours" else warnings.catch_warnings():
            if kind == "peer":
                warnings.simplefilter("ignore")
            for call in calls.values():
                call()
                if self.device.type == "cuda":
                    peaks.append(_peak_on_gpu(self.device, call))
                else:
                    peaks.append(allocated_peak(call))
            seconds: dict[int, list[float]] = {size: [] for size in calls}

            def one_round() -> None:
                for size, call in calls.items():
                    start = time.perf_counter()
                    call()
                    self.synchronize()
                    seconds[size].append(time.perf_counter() - start)

            rounds = QUICK_ROUNDS if self.quick else 7
            self.benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
        if self.benchmark.disabled:
            return
        medians = [sorted(values[1:])[len(values[1:]) // 2] for values in seconds.values()]
        growth = Growth(problem, subject, kind, axis, list(calls), medians, peaks)
        self.benchmark.extra_info |= {
            "time exponent": growth.time_exponent,
            "memory exponent": growth.memory_exponent,
        }
        self.record.growth.append(growth)


def default_device() -> torch.device:
    """A GPU where there is one (CUDA_VISIBLE_DEVICES= hides it)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak_on_gpu(device: torch.device, call: Call) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return max(0, peak - sum(tensor.nbytes for tensor in tensors_in(result)))


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``|value - truth| / |truth|`` over all entries; infinite where an entry is not finite."""
    if not torch.isfinite(value).all():
        return math.inf
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def gate(errors: Mapping[str, float], allowed: Mapping[str, float]) -> str:
    """The errors as text; AssertionError where one is not within what is allowed."""
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise AssertionError(f"{name} {error:.2e}, allowed {allowed[name]:.2e} ({shown})")
    return shown


# ---- what the device can do ----


def measure_ceilings(record: Record, device: torch.device) -> None:
    """Raises ``record.ceilings`` to what square products and a copy reach now (medians)."""
    side, size = (128, 1 << 16) if record.quick else (2048, 256 << 20)
    if device.type == "cuda" and not record.quick:
        side, size = 8192, 4 << 30

    def rate(work: float, call: Call) -> float:
        seconds: list[float] = []
        for _ in range(6):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
        return work / sorted(seconds[1:])[2] / 1e9

    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        record.raise_ceiling(
            product(dtype), rate(2.0 * side**3, lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out))
        )
    source = torch.zeros(size // 4, device=device)
    copied = torch.empty_like(source)
    record.raise_ceiling("copy", rate(2.0 * size, lambda: copied.copy_(source)))


def product(dtype: torch.dtype) -> str:
    """The ceiling's name."""
    return f"{str(dtype).removeprefix('torch.')} GEMM"


def names(values: Sequence[Any]) -> list[str]:
    """Test ids that are the same in every process."""
    return [str(getattr(value, "name", value)).replace(" ", "_") for value in values]
