"""``vcore bench --compare A B``: what moved between two records."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vcore_train.bench_record import Kind, Record, Row, quartiles

# Of the environment: where two runs differ in one of these, ratios may move for that alone.
SAME = ("processor", "instructions", "gpu", "threads", "python", "system", "versions")


@dataclass
class Move:
    """One row in both records. ``ratio``: B's time over A's, each in units of its yardstick."""

    group: str
    subject: str
    kind: Kind
    before: float
    after: float
    beyond_spread: bool  # the quartiles of the two do not overlap

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass
class Comparison:
    moves: list[Move] = field(default_factory=list)  # all matched rows, the slowest first
    new: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def moved(self) -> list[Move]:
        return [move for move in self.moves if move.beyond_spread]

    def slower(self, share: float) -> list[Move]:
        """Rows of ours that slowed by more than ``share`` (0.1: 10%), beyond both spreads."""
        return [m for m in self.moved if m.kind == "ours" and m.ratio > 1 + share]


def compare(a: Record, b: Record) -> Comparison:
    """Rows matched by group and subject, by their time in units of the yardstick."""
    before, after = _timed(a), _timed(b)
    result = Comparison(warnings=_warnings(a, b))
    for key in before.keys() & after.keys():
        first, second = before[key], after[key]
        low, high = quartiles(first.ratios), quartiles(second.ratios)
        result.moves.append(
            Move(
                first.group,
                first.subject,
                second.kind,
                first.units or 0.0,
                second.units or 0.0,
                high[0] > low[1] or high[1] < low[0],
            )
        )
    result.moves.sort(key=lambda move: (-move.ratio, move.group, move.subject))
    result.new = sorted(": ".join(key) for key in after.keys() - before.keys())
    result.vanished = sorted(": ".join(key) for key in before.keys() - after.keys())
    return result


def _timed(record: Record) -> dict[tuple[str, str], Row]:
    rows = (r for r in record.rows if r.status == "measured" and r.units and r.kind != "yardstick")
    return {(row.group, row.subject): row for row in rows}


def _warnings(a: Record, b: Record) -> list[str]:
    found = []
    for name in SAME:
        first, second = a.environment.get(name), b.environment.get(name)
        if isinstance(first, dict) and isinstance(second, dict):
            changed = [k for k in first.keys() | second.keys() if first.get(k) != second.get(k)]
            found += [f"{k}: {first.get(k)} and {second.get(k)}" for k in sorted(changed)]
        elif first != second:
            found.append(f"{name}: {_text(first)} and {_text(second)}")
    if a.quick or b.quick:
        found.append("a record of --quick, whose figures mean nothing")
    return found


def _text(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def lines(result: Comparison) -> list[str]:
    """What is printed."""
    out = [f"warning: the runs differ in {text}" for text in result.warnings]
    moved = result.moved
    out.append(
        f"{len(moved)} of {len(result.moves)} rows moved beyond the spread of both runs (times in "
        "units of the yardstick of the same round)"
    )
    out += [
        f"  {'slower' if m.ratio > 1 else 'faster'} {m.ratio:6.3f}  {m.before:.3g} -> "
        f"{m.after:.3g}  {m.group}: {m.subject}" + (" (a peer)" if m.kind == "peer" else "")
        for m in moved
    ]
    out += [f"  new       {name}" for name in result.new]
    out += [f"  vanished  {name}" for name in result.vanished]
    return out


def share(text: str) -> float:
    """``"10%"`` or ``"10"`` as 0.1."""
    try:
        value = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"--fail-over must be a percentage of at least 0, as 10%, got {text!r}.")
    return value


def compare_files(a: Path, b: Path) -> Comparison:
    return compare(Record.read(a), Record.read(b))
