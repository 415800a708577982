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
    rounds: int  # of the run that has fewer
    beyond_spread: bool  # the quartiles of the two do not overlap; one round has none: False

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass
class Comparison:
    moves: list[Move] = field(default_factory=list)  # all matched rows, the slowest first
    new: list[str] = field(default_factory=list)
    vanished: list[Row] = field(default_factory=list)  # timed in A, no row in B
    untimed: list[Row] = field(default_factory=list)  # of B: timed in A, absent or not timed in B
    wrong: list[Row] = field(default_factory=list)  # of B
    warnings: list[str] = field(default_factory=list)
    exit_status: int = 0  # of B's run

    @property
    def moved(self) -> list[Move]:
        return [move for move in self.moves if move.beyond_spread]

    def slower(self, share: float) -> list[Move]:
        """Rows of ours that slowed by more than ``share`` (0.1: 10%), beyond both spreads."""
        return [m for m in self.moved if m.kind == "ours" and m.ratio > 1 + share]

    def faults(self, share: float) -> list[str]:
        """What of ours is worse in B: slower by more than ``share``, wrong, or without a time."""
        slow = len(self.slower(share))
        found = [f"{slow} rows of ours slowed by more than {100 * share:.4g}%"] if slow else []
        for rows, what in (
            (self.wrong, "are wrong"),
            (self.vanished, "vanished"),
            (self.untimed, "have no time any more"),
        ):
            if ours := [row for row in rows if row.kind == "ours"]:
                found.append(f"{len(ours)} rows of ours {what}")
        if self.exit_status:
            found.append(f"the run of B ended with exit status {self.exit_status}")
        return found


def compare(a: Record, b: Record) -> Comparison:
    """Rows matched by group and subject, by their time in units of the yardstick."""
    before, after = _timed(a), _timed(b)
    result = Comparison(warnings=_warnings(a, b), exit_status=b.exit_status)
    for key in before.keys() & after.keys():
        first, second = before[key], after[key]
        low, high = quartiles(first.ratios), quartiles(second.ratios)
        rounds = min(len(first.ratios), len(second.ratios))
        result.moves.append(
            Move(
                first.group,
                first.subject,
                second.kind,
                first.units or 0.0,
                second.units or 0.0,
                rounds,
                rounds > 1 and (high[0] > low[1] or high[1] < low[0]),
            )
        )
    result.moves.sort(key=lambda move: (-move.ratio, move.group, move.subject))
    result.new = sorted(": ".join(key) for key in after.keys() - before.keys())
    result.wrong = [row for row in b.rows if row.status == "wrong"]
    rows = {(row.group, row.subject): row for row in b.rows}
    for key in sorted(before.keys() - after.keys()):
        if key not in rows:
            result.vanished.append(before[key])
        elif rows[key].status != "wrong":
            result.untimed.append(rows[key])
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
    if a.selection != b.selection:
        found.append(f"suites: {_suites(a)} and {_suites(b)}")
    found = [f"the runs differ in {text}" for text in found]
    if a.quick or b.quick:
        found.append("a record of --quick, whose figures mean nothing")
    for name, record in (("A", a), ("B", b)):
        if not record.complete:
            found.append(f"{name} is not all of its run: {'; '.join(record.missing)}")
    return found


def _suites(record: Record) -> str:
    return " ".join(record.selection) or "all"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def lines(result: Comparison) -> list[str]:
    """What is printed."""
    out = [f"warning: {text}" for text in result.warnings]
    moved = result.moved
    out.append(
        f"{len(moved)} of {len(result.moves)} rows moved beyond the spread of both runs (times in "
        "units of the yardstick of the same round)"
    )
    if single := [move for move in result.moves if move.rounds < 2]:
        out[-1] += f"; {len(single)} have 1 round in a run, which says nothing of its spread"
    for word, moves in (("", moved), ("1 round", single)):
        out += [
            f"  {word or ('slower' if m.ratio > 1 else 'faster'):<7}{m.ratio:6.3f}  {m.before:.3g} "
            f"-> {m.after:.3g}  {m.group}: {m.subject}" + (" (a peer)" if m.kind == "peer" else "")
            for m in moves
        ]
    out += [f"  new       {name}" for name in result.new]
    out += [f"  wrong     {_name(row)}: {row.gate}" for row in result.wrong]
    out += [f"  vanished  {_name(row)}" for row in result.vanished]
    out += [
        f"  {'absent' if row.status == 'absent' else 'untimed':<8}  {_name(row)}"
        + (f": {row.note}" if row.note else "")
        for row in result.untimed
    ]
    return out


def _name(row: Row) -> str:
    peer = " (a peer)" if row.kind == "peer" else ""
    return f"{row.group}: {row.subject}{peer}"


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
    before, after = Record.read(a), Record.read(b)
    if not _timed(before):
        raise ValueError(
            f"{a}: holds no row with a time, expected one to compare with. Make a record with: "
            "vcore bench --out DIR"
        )
    return compare(before, after)
