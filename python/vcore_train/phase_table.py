"""From the events of a Chrome trace of PyTorch's profiler to a table of a training step's phases.

Times in a trace are microseconds. A phase is the span ``vcore::NAME`` of one of :data:`PHASES`; its
time is that of the thread that trains, without the phases nested in it, so that the rows of the
table add up to the step. ``other`` is the rest of a step: data, logs, learning rate, zeroed
gradients.
"""

import csv
import gzip
import io
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vcore_kernels.spans import PREFIX
from vcore_train.plain import markdown_table

# Of VcoreTrainer, then of GvmTrainer, in the order of a step.
PHASES = (
    *("direction", "utilities", "weights", "training_pass", "clip", "optimizer"),
    *("e_step", "sampling", "verification", "gradient_norms", "allocation", "logp"),
)
OTHER = "other"
STEP, OPTIMIZER = "ProfilerStep#", "Optimizer.step#"  # what PyTorch itself calls these spans
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver", "hip_runtime")
MIB = 2**20
TOP = 4  # operators that the table names of each phase


@dataclass
class Span:
    """A span or an operator on one thread; ``inside``: what its time includes."""

    name: str
    start: float
    end: float
    thread: Any
    depth: int = 0
    inside: float = 0.0

    @property
    def self_time(self) -> float:
        return max(0.0, self.end - self.start - self.inside)

    @property
    def phase(self) -> str | None:
        name = self.name.removeprefix(PREFIX)
        if self.name.startswith(OPTIMIZER):
            return "optimizer"
        return name if self.name.startswith(PREFIX) and name in PHASES else None


@dataclass(frozen=True)
class Piece:
    """An interval of the training thread that belongs to one phase, or to ``other``."""

    start: float
    end: float
    phase: str


@dataclass(frozen=True)
class Row:
    """A phase, over one step: milliseconds, MiB."""

    phase: str
    ms: float
    share: float  # of the step
    calls: float
    device_ms: float  # on the accelerator, by where it was launched; 0 without one
    peak: float  # tensors live at once, beyond those at the first step's start
    added: float  # the same, beyond those when the phase was entered
    ops: tuple[tuple[str, float], ...]  # operators by time of their own, ms, all threads


@dataclass(frozen=True)
class Profile:
    """Steps of a trace taken apart."""

    steps: list[Span]  # in order
    spans: list[Span]  # of all threads, steps included
    pieces: list[Piece]  # of all steps, in order
    rows: list[Row]
    device: list[tuple[float, float, str]]  # start, end, phase that launched it

    @property
    def step_ms(self) -> float:
        return sum(step.end - step.start for step in self.steps) / len(self.steps) / 1e3


def read_trace(path: str | Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, ``.json`` or ``.json.gz``.

    Raises ValueError for another file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        found = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
        return found["traceEvents"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not a Chrome trace of torch.profiler ({error}).") from error


def nested(events: Iterable[dict[str, Any]]) -> list[Span]:
    """Spans and operators of each thread, with depth and with the time that is not their own."""
    taken = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("cpu_op", *_SPANS)]
    spans: list[Span] = []
    open_spans: dict[Any, list[Span]] = {}
    for event in sorted(taken, key=lambda e: (float(e["ts"]), -float(e.get("dur", 0)))):
        start = float(event["ts"])
        thread = event.get("pid"), event.get("tid")
        span = Span(str(event["name"]), start, start + float(event.get("dur", 0)), thread)
        stack = open_spans.setdefault(thread, [])
        while stack and stack[-1].end <= span.start:
            stack.pop()
        if stack:
            span.end = min(span.end, stack[-1].end)  # times are rounded
            stack[-1].inside += span.end - span.start
        span.depth = len(stack)
        stack.append(span)
        spans.append(span)
    return spans


_SPANS = ("user_annotation",)


def take_apart(events: Sequence[dict[str, Any]]) -> Profile:
    """The table of a trace.

    Raises ValueError where it has no step: none that ended, or a loop without ``profiler.step()``.
    """
    spans = nested(events)
    steps = sorted((s for s in spans if s.name.startswith(STEP)), key=lambda s: s.start)
    if not steps:
        raise ValueError(
            "the trace has no ProfilerStep. Give torch.profiler.profile a schedule and call its "
            "step() after each training step."
        )
    thread = steps[0].thread
    phases = [s for s in spans if s.thread == thread and s.phase]
    pieces = [piece for step in steps for piece in _pieces(step, phases)]
    starts = [piece.start for piece in pieces]

    def phase_at(time: float) -> str | None:
        i = bisect_right(starts, time) - 1
        return pieces[i].phase if i >= 0 and time < pieces[i].end else None

    own: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for span in spans:
        phase = phase_at(span.start)
        if phase and not span.phase and not span.name.startswith(STEP):
            own[phase][span.name] += span.self_time
    device = _on_device(events, phase_at)
    device_time: dict[str, float] = defaultdict(float)
    for start, end, phase in device:
        device_time[phase] += end - start
    time: dict[str, float] = defaultdict(float)
    for piece in pieces:
        time[piece.phase] += piece.end - piece.start
    memory = _memory(events, pieces)
    calls = _calls(phases, steps)
    total, number = sum(time.values()), len(steps)
    rows = []
    for phase in (*PHASES, OTHER):
        if phase not in time:
            continue
        peak, added = memory.get(phase, (0.0, 0.0))
        ops = sorted(own[phase].items(), key=lambda op: -op[1])[:TOP]
        rows.append(
            Row(
                phase,
                ms=time[phase] / number / 1e3,
                share=time[phase] / total,
                calls=calls[phase] / number,
                device_ms=device_time[phase] / number / 1e3,
                peak=peak / MIB,
                added=added / MIB,
                ops=tuple((name, spent / number / 1e3) for name, spent in ops),
            )
        )
    return Profile(steps, spans, pieces, rows, device)


def _pieces(step: Span, phases: Sequence[Span]) -> list[Piece]:
    """The step cut where a phase begins or ends; each piece belongs to the innermost phase."""
    inside = [p for p in phases if step.start <= p.start < step.end]
    cuts = {step.start, step.end}
    for phase in inside:
        cuts |= {phase.start, min(phase.end, step.end)}
    pieces: list[Piece] = []
    ordered = sorted(cuts)
    for start, end in pairwise(ordered):
        around = [p for p in inside if p.start <= start and end <= p.end]
        name = max(around, key=lambda p: p.depth).phase if around else OTHER
        assert name is not None
        if pieces and pieces[-1].phase == name and name in (OTHER, "optimizer"):
            pieces[-1] = Piece(pieces[-1].start, end, name)
        else:
            pieces.append(Piece(start, end, name))
    return pieces


def _calls(phases: Sequence[Span], steps: Sequence[Span]) -> Counter[str]:
    """How often each phase was entered; PyTorch's own span of the optimizer in ours counts once."""
    calls: Counter[str] = Counter()
    last_end: dict[str, float] = {}
    for span in phases:
        name = span.phase
        assert name is not None
        if any(step.start <= span.start < step.end for step in steps):
            if span.start >= last_end.get(name, -1.0):
                calls[name] += 1
            last_end[name] = max(span.end, last_end.get(name, -1.0))
    return calls


def _on_device(events: Iterable[dict[str, Any]], phase_at: Any) -> list[tuple[float, float, str]]:
    """What ran on the accelerator, by the phase that launched it."""
    launched: dict[Any, float] = {}
    ran = []
    for event in events:
        number = event.get("args", {}).get("correlation")
        if event.get("ph") != "X" or number is None:
            continue
        if event.get("cat") in LAUNCHES:
            launched[number] = float(event["ts"])
        elif event.get("cat") in ON_DEVICE:
            ran.append((float(event["ts"]), float(event.get("dur", 0)), number))
    found = []
    for start, length, number in ran:
        phase = phase_at(launched[number]) if number in launched else None
        if phase:
            found.append((start, start + length, phase))
    return sorted(found)


def _memory(
    events: Iterable[dict[str, Any]], pieces: Sequence[Piece]
) -> dict[str, tuple[float, float]]:
    """Bytes of each phase: peak over the first step's start, and over its own entry."""
    changes: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for event in events:
        if event.get("name") == "[memory]":
            args = event["args"]
            changes[args["Device Type"] != 0].append((float(event["ts"]), float(args["Bytes"])))
    timeline = sorted(changes[True] or changes[False], key=lambda change: change[0])
    found: dict[str, tuple[float, float]] = {}
    live, place, base = 0.0, 0, None
    for piece in pieces:
        while place < len(timeline) and timeline[place][0] < piece.start:
            live += timeline[place][1]
            place += 1
        base = live if base is None else base
        entry = most = live
        while place < len(timeline) and timeline[place][0] < piece.end:
            live += timeline[place][1]
            most = max(most, live)
            place += 1
        peak, added = found.get(piece.phase, (0.0, 0.0))
        found[piece.phase] = max(peak, most - base), max(added, most - entry)
    return found


# ---- as text ----


def columns(profile: Profile) -> list[str]:
    device = ["device ms"] if profile.device else []
    return ["phase", "ms", "share", "calls", *device, "peak MiB", "added MiB", "own time, ms"]


def cells(profile: Profile, top: int = TOP) -> list[list[str]]:
    """The rows of the table, with ``top`` operators each, and, last, the whole step."""
    lines = [
        [
            row.phase,
            f"{row.ms:.1f}",
            f"{row.share:.1%}",
            "" if row.phase == OTHER else f"{row.calls:g}",
            *([f"{row.device_ms:.1f}"] if profile.device else []),
            f"{row.peak:.1f}",
            f"{row.added:.1f}",
            ", ".join(f"{short(name)} {ms:.1f}" for name, ms in row.ops[:top]),
        ]
        for row in profile.rows
    ]
    device = [f"{sum(row.device_ms for row in profile.rows):.1f}"] if profile.device else []
    peak = max(row.peak for row in profile.rows)
    lines.append(["step", f"{profile.step_ms:.1f}", "100.0%", "", *device, f"{peak:.1f}", "", ""])
    return lines


def short(name: str) -> str:
    """An operator's name as the table and the picture have it."""
    for prefix in ("autograd::engine::evaluate_function: ", "aten::", "vcore_kernels::"):
        name = name.removeprefix(prefix)
    return name.replace("scaled_dot_product_", "sdp_")


def to_markdown(profile: Profile) -> str:
    """The table in Markdown, with a line on what it says."""
    table = "\n".join(markdown_table(columns(profile), cells(profile), text=1))
    return (
        f"Mean of {len(profile.steps)} steps. Times are of the training thread, nested phases not "
        "included; own time is that of operators without what they call, over all threads. Peak: "
        "tensors beyond those at the start; added: beyond those when the phase was entered.\n\n"
        f"{table}\n"
    )


def to_csv(profile: Profile) -> str:
    """One line a phase, numbers unrounded; the last column has ``name=ms`` pairs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("phase", "ms", "share", "calls", "device_ms", "peak_mib", "added_mib", "own_ms")
    writer.writerow(names)
    for row in profile.rows:
        ops = "; ".join(f"{name}={ms:.6g}" for name, ms in row.ops)
        figures = (row.ms, row.share, row.calls, row.device_ms, row.peak, row.added)
        writer.writerow([row.phase, *(f"{figure:.6g}" for figure in figures), ops])
    return out.getvalue()
