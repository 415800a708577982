"""Two evaluations compared problem by problem.

Two models answer the same problems, so their scores vary together, and the difference of the two
means is known better than their separate standard errors say: its standard error is that of the
mean of the differences. For metrics that are 0 or 1 the problems that only one of the two got
right decide, by McNemar's exact test; for others a paired t-test, or the sign test where every
problem differs by the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vcore_train.evals.results import leaves, percent, print_wide, read, read_samples

# Settings in which two results may differ and still be about the same thing: what is compared,
# where it is, how fast it goes. Of the problems their hashes tell.
MAY_DIFFER = ("model", "adapter", "out", "data", "tasks", "cpu", "batch_size")

Key = tuple[str, str]  # metric, filter


@dataclass(frozen=True)
class Difference:
    """B - A over ``problems`` that both have.

    ``stderr``: of the mean difference, None with one problem. ``only_a``, ``only_b``: problems
    that one alone got right, None for metrics that are not 0 or 1. ``p``: two-sided.
    """

    task: str
    metric: str
    filter: str
    problems: int
    a: float
    b: float
    difference: float
    stderr: float | None
    only_a: int | None
    only_b: int | None
    p: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, normal."""
        if self.stderr is None:
            return None
        return self.difference - 1.96 * self.stderr, self.difference + 1.96 * self.stderr


def compare(a: Path, b: Path) -> tuple[list[Difference], list[str]]:
    """The differences for every task and metric that two result folders share, and warnings.

    The tasks of a group count as one task. Raises ValueError where they share none, or where the
    problems of a task are not the same.
    """
    records = read(a), read(b)
    names = [task for task in _tasks(records[0]) if task in _tasks(records[1])]
    if not names:
        raise ValueError(
            f"--compare: {a} has {', '.join(_tasks(records[0]))} and {b} "
            f"{', '.join(_tasks(records[1]))}: no task is in both."
        )
    pairs = list(zip((a, b), records, strict=True))
    differences: list[Difference] = []
    warnings = _warnings(records, names)
    for name in names:
        values = [_values(folder, record, name) for folder, record in pairs]
        found, missing = _differences(name, *values)
        differences += found
        warnings += missing
    if not differences:
        raise ValueError(
            f"--compare: {', '.join(names)} has no metric with values in both folders. Evaluate "
            "both with the same --samples."
        )
    return differences, warnings


def _tasks(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """The groups and the tasks in none, each with the tasks whose samples it has."""
    groups: dict[str, list[str]] = record["groups"]
    inside = {task for tasks in groups.values() for task in tasks}
    found = {}
    for name in record["tasks"]:
        if name in inside:
            continue
        found[name] = leaves(name, groups)
    return found


def _values(
    folder: Path, record: Mapping[str, Any], name: str
) -> dict[Key, dict[tuple[str, int], tuple[str, float]]]:
    """By metric, then by problem: what the problem was, and the value, NaN for none."""
    found: dict[Key, dict[tuple[str, int], tuple[str, float]]] = {}
    for task in _tasks(record)[name]:
        for row in read_samples(folder, task, record["tasks"].get(task, {}).get("problems")):
            for metric, value in row["values"].items():
                if value is None or isinstance(value, int | float):
                    number = float("nan") if value is None else float(value)
                    problems = found.setdefault((metric, row["filter"]), {})
                    problems[(task, row["doc_id"])] = row["doc_hash"], number
    return found


def _differences(
    name: str,
    a: Mapping[Key, Mapping[Any, tuple[str, float]]],
    b: Mapping[Key, Mapping[Any, tuple[str, float]]],
) -> tuple[list[Difference], list[str]]:
    """The differences, and of how many problems a value is missing."""
    found, warnings = [], []
    for key in a:
        if key not in b:
            continue
        shared = [problem for problem in a[key] if problem in b[key]]
        changed = [problem for problem in shared if a[key][problem][0] != b[key][problem][0]]
        if changed or not shared:
            raise ValueError(
                f"--compare: {name} has other problems in the second folder "
                f"({len(changed)} of {len(shared)} shared ones differ). Evaluate both on the same "
                "version of the data."
            )
        first = np.array([a[key][problem][1] for problem in shared])
        second = np.array([b[key][problem][1] for problem in shared])
        known = np.isfinite(first) & np.isfinite(second)
        if not known.all():
            warnings.append(
                f"{name} {key[0]}: {len(known) - known.sum()} of {len(known)} problems have no "
                "value in one of the two, and are left out"
            )
        if known.any():
            found.append(difference(name, *key, first[known], second[known]))
    return found, warnings


def difference(
    task: str, metric: str, filter_name: str, a: np.ndarray, b: np.ndarray
) -> Difference:
    """The paired difference of values [n] of two models on the same n problems."""
    from scipy import stats

    count = len(a)
    change = b - a
    stderr = float(change.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    only_a = only_b = None
    p: float | None = None
    if binary:
        only_a, only_b = int((a > b).sum()), int((b > a).sum())
        decided = only_a + only_b
        p = float(stats.binomtest(only_b, decided).pvalue) if decided else 1.0
    elif stderr is not None and np.ptp(change) > 1e-12 * np.abs(change).max():
        p = float(2 * stats.t.sf(abs(change.mean()) / stderr, count - 1))
    elif stderr is not None:  # all the same: no spread for a t-test, but a sign
        p = 2.0 ** (1 - count) if change.any() else 1.0
    return Difference(
        task=task,
        metric=metric,
        filter=filter_name,
        problems=count,
        a=float(a.mean()),
        b=float(b.mean()),
        difference=float(change.mean()),
        stderr=stderr,
        only_a=only_a,
        only_b=only_b,
        p=p,
    )


def _warnings(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    a, b = records
    found = []
    for name in {**a["settings"], **b["settings"]}:
        left, right = a["settings"].get(name), b["settings"].get(name)
        if left != right and name not in MAY_DIFFER:
            found.append(f"--{name.replace('_', '-')} was {left} and {right}")
    if a["harness"] != b["harness"]:
        found.append(f"the harness was {a['harness']['version']} and {b['harness']['version']}")
    for name in names:
        left, right = a["tasks"][name], b["tasks"][name]
        if left["version"] != right["version"]:
            found.append(f"{name} was of version {left['version']} and {right['version']}")
        if left["problems"] != right["problems"]:
            found.append(f"{name} had {left['problems']} and {right['problems']} problems")
    return found


def show(a: Path, b: Path, console: Console) -> list[Difference]:
    """Prints the comparison of two folders; returns it."""
    differences, warnings = compare(a, b)
    table = Table(box=None)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for column in ("n", "A", "B", "B - A", "95%", "only A", "only B", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in differences:
        plain = row.filter in ("none", "all")
        interval = row.interval
        table.add_row(
            escape(row.task),
            escape(row.metric if plain else f"{row.metric} ({row.filter})"),
            str(row.problems),
            percent(row.a),
            percent(row.b),
            f"{100 * row.difference:+.2f}",
            "" if interval is None else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}",
            "" if row.only_a is None else str(row.only_a),
            "" if row.only_b is None else str(row.only_b),
            "" if row.p is None else f"{row.p:.3g}",
        )
    print_wide(table, f"A: {a}, B: {b}", console)
    for warning in warnings:
        console.print(f"Not the same: {warning}.", soft_wrap=True, markup=False)
    return differences
