"""What ``pytest benchmarks/`` measures, as a record that can be written, read and compared.

Times are compared as ratios to a yardstick that ran beside the subject in the same round (for the
head one matrix product), so that a machine that is busy for a while slows both.
"""

import json
import math
import os
import platform
import statistics
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vcore_train import provenance
from vcore_train.plain import plain

Kind = Literal["ours", "peer", "yardstick"]
# "checked": the results are right and no time was taken; "absent": `note` says why; "wrong": the
# gate did not let it pass, so that it was not timed.
Status = Literal["measured", "checked", "absent", "wrong"]
FORMAT = "vcore bench 1"
DIGITS = 6  # of the floats in files
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "peft", "pytest-benchmark"),
    *("cut-cross-entropy", "liger-kernel", "quack-kernels"),
)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one value twice that value."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


@dataclass
class Row:
    """One subject on one problem. Whatever was not measured is None or empty."""

    group: str  # the problem: rows of a group do the same and compare
    subject: str
    kind: Kind = "peer"
    status: Status = "checked"
    note: str = ""
    unit: str = ""  # the yardstick
    seconds: list[float] = field(default_factory=list)  # one a round
    unit_seconds: list[float] = field(default_factory=list)  # of the yardstick in the same rounds
    flops: float | None = None  # that the task asks for, however it is done
    bytes: float | None = None  # that must be read and written once, inputs and results
    ceiling: str = ""  # a name in Record.ceilings: what bounds the task
    extra_bytes: int | None = None  # peak beyond inputs and what is returned
    accumulator_bytes: int = 0  # float32 sums of a gradient, counted in extra_bytes
    logits_bytes: int | None = None  # of the logits in the inputs' dtype, for comparison
    gate: str = ""  # how the results were checked, with the errors
    facts: dict[str, float | None] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError where the fields contradict each other."""
        for name, values in (("seconds", self.seconds), ("unit_seconds", self.unit_seconds)):
            if min(values, default=1) <= 0:
                raise ValueError(f"{name} must be above 0, got {min(values)}")
        if self.unit_seconds and len(self.unit_seconds) != len(self.seconds):
            raise ValueError(
                f"seconds and unit_seconds must be of the same rounds, got {len(self.seconds)} and "
                f"{len(self.unit_seconds)}"
            )
        if self.status == "measured" and not self.seconds:
            raise ValueError("status is 'measured' without seconds, expected those of a round")

    @property
    def seconds_median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """The time in units of the yardstick's, one a round."""
        return [a / b for a, b in zip(self.seconds, self.unit_seconds, strict=True)]

    @property
    def units(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


@dataclass
class Growth:
    """How one subject's time and memory grow with one size, the others fixed."""

    problem: str
    subject: str
    kind: Kind
    axis: str
    sizes: list[int]
    seconds: list[float]  # medians
    extra_bytes: list[int] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError where the fields contradict each other."""
        if (
            len(self.seconds) != len(self.sizes)
            or min([*self.sizes, *self.seconds], default=1) <= 0
        ):
            raise ValueError("sizes and seconds must be as many, and above 0")

    @property
    def time_exponent(self) -> float | None:
        return exponent(self.sizes, self.seconds)

    @property
    def memory_exponent(self) -> float | None:
        return exponent(self.sizes, self.extra_bytes)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """k of ``values ~ sizes**k`` by least squares in logarithms; None without positive values."""
    if len(values) != len(sizes) or len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


@dataclass
class Record:
    """All that one run has found."""

    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)  # GFLOP/s; GB/s of the copy
    rows: list[Row] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    seconds: float = 0.0
    quick: bool = False
    selection: list[str] = field(default_factory=list)  # as --select names suites; empty: all
    missing: list[str] = field(default_factory=list)  # why not all tests of the selection ran
    exit_status: int = 0  # pytest's

    @property
    def complete(self) -> bool:
        return not self.missing

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def groups(self) -> dict[str, list[Row]]:
        """The rows by group: yardstick, ours, peers; those without a time last."""
        order = {"yardstick": 0, "ours": 1, "peer": 2}
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, []).append(row)
        return {
            group: sorted(rows, key=lambda r: (r.status == "absent", order[r.kind]))
            for group, rows in grouped.items()
        }

    def rate(self, row: Row) -> float | None:
        """GFLOP/s where a product bounds the task, GB/s where a copy does."""
        work = row.bytes if row.ceiling == "copy" else row.flops
        return work / row.seconds_median / 1e9 if work and row.seconds else None

    def percent(self, row: Row) -> float | None:
        """Of the ceiling measured in this run. Above 100: faster than PyTorch's own product."""
        rate, ceiling = self.rate(row), self.ceilings.get(row.ceiling)
        return 100 * rate / ceiling if rate and ceiling else None

    def raise_ceiling(self, name: str, rate: float) -> None:
        self.ceilings[name] = max(rate, self.ceilings.get(name, 0.0))

    def behind(self) -> list[str]:
        """Each of our rows that is not as fast as a peer of its group, and by how much."""
        lines = []
        for group, rows in self.groups().items():
            peers = [r for r in rows if r.kind == "peer" and r.units and r.status == "measured"]
            if not peers:
                continue
            best = min(peers, key=lambda r: r.units or math.inf)
            for row in rows:
                if row.kind != "ours" or not row.units or not best.units:
                    continue
                if row.units / best.units >= 1.005:
                    lines.append(
                        f"{group}: {row.subject} takes {row.units / best.units:.2f} x the time of "
                        f"{best.subject}"
                    )
        return lines

    def failures(self) -> list[str]:
        """Our own results that are wrong."""
        return [
            f"{row.group}: {row.subject}: {row.gate}"
            for row in self.rows
            if row.kind == "ours" and row.status == "wrong"
        ]

    def write(self, path: Path) -> None:
        data = {"format": FORMAT, "complete": self.complete, **asdict(self)}
        text = json.dumps(plain(data, DIGITS), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in ``path``; ValueError where there is none, or where it does not fit."""
        again = "Make one with: vcore bench --out DIR"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: no record of vcore bench: {error}. {again}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(
                f"{path}: no record of vcore bench of this version (format {FORMAT!r}). {again}"
            )
        try:
            if "rows" not in data:
                raise ValueError("rows are missing, expected a list")
            made = {
                name: [_made(kind, row, f"{name}[{i}]") for i, row in enumerate(data[name])]
                for name, kind in (("rows", Row), ("growth", Growth))
                if isinstance(data.get(name), list)
            }
            return _made(cls, data | made, "record")
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}. The file was changed, or another version wrote it. {again}"
            ) from error


def _made(kind: type, data: Any, place: str) -> Any:
    """The dataclass from what is known of ``data``; ValueError names the place that is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f"{place} must be an object, got {data!r:.80}")
    hints = get_type_hints(kind)
    known = {f.name: data[f.name] for f in fields(kind) if f.name in data}
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"{place}.{name} must be {_wanted(hints[name])}, got {value!r:.80}")
    try:
        made = kind(**known)
        if kind is not Record:
            made.check()
    except (TypeError, ValueError) as error:  # TypeError: without a field that has no default
        raise ValueError(f"{place}: {error}") from error
    return made


def _fits(value: Any, hint: Any) -> bool:
    """Whether what JSON gave is of the type that a field of the dataclasses here names."""
    kind, inside = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return isinstance(value, str) and value in inside
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, inside[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(item, inside[1]) for item in value.values())
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    """The type in words."""
    kind, inside = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(inside)}"
    if kind in (Union, types.UnionType):
        return " or ".join(map(_wanted, inside))
    if kind is list:
        return f"a list, each item {_wanted(inside[0])}"
    if kind is dict:
        return f"an object, each value {_wanted(inside[1])}"
    words = {str: "text", float: "a number", int: "a whole number", bool: "true or false"}
    return words.get(hint, "null" if hint is type(None) else "an object")


def environment(root: Path) -> dict[str, Any]:
    """Commit, versions and hardware of this process; ``root`` is the source checkout."""
    import torch

    from vcore_train.info import FEATURES, cpu_features

    state = provenance.checkout_state(root)
    has = cpu_features(provenance.cpuinfo())
    return {
        "commit": state[0] if state else "unknown",
        "dirty": bool(state and state[1]),
        "python": platform.python_version(),
        "versions": provenance.versions(PACKAGES),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": provenance.processor(),
        "instructions": [name for name in FEATURES if has[name]],
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
