"""A budget of samples distributed over the prompts of a table: rates and norms in, counts out."""

import csv
import inspect
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import Tensor

from vcore_kernels import allocate, gvm_allocate, gvm_variance_bound
from vcore_kernels.allocation import RULES_BY_RATE
from vcore_kernels.gvm_allocate import gvm_weights
from vcore_train.data import read_rows, recognise, value_of

RATE_FIELDS = ("accept_rate", "p")
NORM_FIELDS = ("grad_norm", "G", "g")
ACCEPTED, SAMPLED, COUNT = "accepted", "sampled", "count"
SEQUENTIAL = "reinforce_ada"
ROWS_SHOWN = 20
LABEL_WIDTH = 40


def allocate_table(
    table: Path,
    budget: int,
    *,
    rule: str = "gvm",
    rate_field: str | None = None,
    norm_field: str | None = None,
    out: Path | None = None,
    options: dict[str, Any],
    console: Console,
) -> list[int]:
    """Distributes ``budget`` samples over the rows of ``table``; shows, writes and returns counts.

    The acceptance rate p stands in a field of ``RATE_FIELDS``, or follows from ``accepted`` and
    ``sampled`` (0 where none was sampled); the gradient norm G, which only gvm needs, in one of
    ``NORM_FIELDS``. Where both are known, GVM's bound on the variance of the gradient is shown for
    this allocation and for uniform.

    ``reinforce_ada`` watches what comes: its next round is returned, after the ``accepted`` of
    ``sampled`` responses of the table, which count toward the budget. To other rules these fields
    are a rate, and the budget is what is still to be sampled.

    Args:
        table: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, a prompt a row. A CSV may
            spell numbers as text.
        budget, rule, options: as for :func:`vcore_kernels.allocate`.
        rate_field, norm_field: None: recognised from the first row. A dotted name reaches inside.
        out: the rows with a field ``count``, which replaces one of that name: ``.jsonl``, ``.csv``
            or ``.parquet``. An existing file is replaced whole or, on an error, kept.

    Raises:
        NothingToAllocateError: a ValueError, where the rule has no use for any sample.
        ValueError, FileNotFoundError: with the file, the row, the field and what was expected.
    """
    if out is not None and out.suffix not in WRITERS:
        raise ValueError(f"{out}: expected a name that ends in {', '.join(WRITERS)}.")
    prompts = _Prompts(table, rate_field, norm_field)
    known: dict[str, Tensor] = {}
    if rule in RULES_BY_RATE:
        known["accept_rate"] = prompts.rates()
    if rule == "gvm":
        known["grad_norm"] = prompts.norms()
    if rule == SEQUENTIAL and prompts.counted:
        known[SAMPLED], known[ACCEPTED] = (x.to(torch.int64) for x in prompts.outcomes())
    counts = allocate(rule, budget, prompts=len(prompts.rows), **known, **options)
    if out is not None:
        rows = [
            {**row, COUNT: count} for row, count in zip(prompts.rows, counts.tolist(), strict=True)
        ]
        _write(rows, out)
    _show(prompts, budget, rule, counts, options, console)
    if out is not None:
        console.print(f"Counts: [bold]{escape(str(out))}[/]", soft_wrap=True)
    return counts.tolist()


class _Prompts:
    """The rows of a table and their columns of numbers, [m] in float64."""

    def __init__(self, table: Path, rate_field: str | None, norm_field: str | None):
        if not table.is_file():
            raise FileNotFoundError(f"{table}: no such file.")
        pairs = list(read_rows(table))
        if not pairs:
            raise ValueError(f"{table}: no rows to allocate samples to.")
        self.places = [where for where, _ in pairs]
        self.rows = [row for _, row in pairs]
        self.columns: dict[str, Tensor] = {}
        self._rate_field, self._norm_field = rate_field, norm_field

    @property
    def counted(self) -> bool:
        return all(name in self.rows[0] for name in (ACCEPTED, SAMPLED))

    def rates(self) -> Tensor:
        """p, as given or accepted / sampled."""
        given = self._rate_field or any(name in self.rows[0] for name in RATE_FIELDS)
        if self.counted and not given:
            sampled, accepted = self.outcomes()
            return accepted / sampled.clamp(min=1)
        name = self._rate_field or recognise(self.rows[0], RATE_FIELDS, "rate", self.places[0])
        # As far beyond 1 as vcore_kernels allows: a sum's rounding.
        return self._column(
            name,
            lambda p: (p >= 0) & (p <= 1 + 1e-6),
            "a number between 0 and 1 (accepted / sampled)",
        )

    def norms(self) -> Tensor:
        """G."""
        name = self._norm_field or recognise(self.rows[0], NORM_FIELDS, "norm", self.places[0])
        return self._column(
            name,
            lambda g: (g >= 0) & (g < math.inf),
            "a finite number, 0 or more (0 where no response was accepted)",
        )

    def outcomes(self) -> tuple[Tensor, Tensor]:
        """Samples so far, and the accepted among them."""
        sampled = self._column(
            SAMPLED, lambda n: (n >= 0) & (n <= 2**53) & (n == n.floor()), "a whole number"
        )
        accepted = self._column(
            ACCEPTED,
            lambda n: (n >= 0) & (n <= sampled) & (n == n.floor()),
            f"a whole number, at most {SAMPLED!r}",
        )
        return sampled, accepted

    def _column(self, name: str, allowed: Callable[[Tensor], Tensor], expected: str) -> Tensor:
        if name not in self.columns:
            values = [_number(value_of(row, name)) for row in self.rows]
            column = torch.tensor(values, dtype=torch.float64)
            wrong = ~allowed(column)
            if wrong.any():
                at = int(wrong.nonzero()[0])
                value = value_of(self.rows[at], name)
                came = "missing or null" if value is None else f"{value!r:.60}"
                raise ValueError(
                    f"{self.places[at]}: field {name!r} is {came}, expected {expected}."
                )
            self.columns[name] = column
        return self.columns[name]


def _number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# ---- what is shown ----


def _show(
    prompts: _Prompts,
    budget: int,
    rule: str,
    counts: Tensor,
    options: dict[str, Any],
    console: Console,
) -> None:
    sampled = counts[counts > 0].tolist()
    summary = Table(
        title=f"Allocation by {rule}", title_justify="left", show_header=False, box=None
    )
    summary.add_column(style="dim")
    summary.add_column(overflow="fold")
    summary.add_row("prompts", f"{len(counts):,}")
    summary.add_row("budget", f"{budget:,} samples")
    if int(counts.sum()) != budget:
        summary.add_row("of it, in this round", f"{int(counts.sum()):,} samples")
    summary.add_row("prompts with 0 samples", f"{len(counts) - len(sampled):,}")
    if sampled:
        middle = f"median {statistics.median(sampled):,.12g}"
        summary.add_row("samples of the others", f"{min(sampled):,} to {max(sampled):,}, {middle}")
    if sampled and rule != SEQUENTIAL:
        for name, value in _bounds(prompts, counts, options):
            summary.add_row(name, Text(value))
    console.print(summary)
    console.print(_first_rows(prompts, counts))
    if len(counts) > ROWS_SHOWN:
        console.print(f"... and {len(counts) - ROWS_SHOWN:,} more")


def _bounds(prompts: _Prompts, counts: Tensor, options: dict[str, Any]) -> list[tuple[str, str]]:
    """GVM's bound on the variance of the gradient: its least, and where allocations have it."""
    try:
        rates, norms = prompts.rates(), prompts.norms()
    except ValueError as error:
        return [("bound of the variance", f"not known: {error}")]
    parameters = inspect.signature(gvm_allocate).parameters
    shape = {name: options.get(name, parameters[name].default) for name in ("alpha", "beta")}
    samples = int(counts.sum())
    least = gvm_variance_bound(norms, rates, samples, **shape)
    a = gvm_weights("allocate_table", norms, rates, **shape)

    def bound(n: Tensor) -> str:
        unseen = int(((a > 0) & (n == 0)).sum())
        if unseen:
            return f"infinite: no samples for {unseen:,} with p and G above 0"
        if not a.any():
            return "0"
        times = float((a.square() / n.clamp(min=1)).sum()) * samples / float(a.sum()) ** 2
        return f"{times * least:.4g}, {times:.4g} times the least"

    return [
        ("least bound of the variance", f"{least:.4g}"),
        ("bound of this allocation", bound(counts)),
        ("bound of uniform", bound(allocate("uniform", samples, prompts=len(counts)))),
    ]


def _first_rows(prompts: _Prompts, counts: Tensor) -> Table:
    """Row numbers, the numbers that were read, counts, and a further field to know prompts by."""
    label = next((name for name in prompts.rows[0] if name not in (*prompts.columns, COUNT)), None)
    shown = Table(title="Rows", title_justify="left")
    for name in ("row", *prompts.columns, COUNT):
        shown.add_column(escape(name), justify="right")
    if label is not None:
        shown.add_column(escape(label), no_wrap=True, max_width=LABEL_WIDTH)
    for at in range(min(len(counts), ROWS_SHOWN)):
        cells = [prompts.places[at].rpartition(" ")[2]]
        cells += [f"{float(column[at]):.4g}" for column in prompts.columns.values()]
        cells += [f"{int(counts[at])}"]
        text = [] if label is None else [Text(_one_line(prompts.rows[at].get(label)))]
        shown.add_row(*cells, *text)
    return shown


def _one_line(value: Any) -> str:
    text = " ".join(str(value)[: 2 * LABEL_WIDTH].split())
    return text.encode("utf-8", "backslashreplace").decode()


# ---- what is written ----


def _write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    written = out.with_name(f"{out.name}.tmp")
    try:
        WRITERS[out.suffix](rows, written)
        os.replace(written, out)
    finally:
        written.unlink(missing_ok=True)


def _write_jsonl(rows: Sequence[dict[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        encode = json.JSONEncoder(default=str).encode
        file.writelines(f"{encode(row)}\n" for row in rows)


def _write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Lists and structures as JSON."""
    names = _names(rows)
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = (row.get(name) for name in names)
            writer.writerow(
                json.dumps(v, default=str) if isinstance(v, list | dict) else v for v in values
            )


def _write_parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = {name: pyarrow.array([row.get(name) for row in rows]) for name in _names(rows)}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except (pyarrow.ArrowException, OverflowError, UnicodeError) as error:
        raise ValueError(
            f"the rows do not fit into columns of parquet ({error}). Write .jsonl instead."
        ) from error


def _names(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


WRITERS: dict[str, Callable[[Sequence[dict[str, Any]], Path], None]] = {
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
