"""A record of ``pytest benchmarks/`` for people: a table in the terminal, and three files."""

import statistics
from pathlib import Path

from vcore_train.bench_record import Record, Row, quartiles
from vcore_train.plain import markdown_table

COLUMNS = ("subject", "ms [q1, q3]", "x unit [q1, q3]", "% of ceiling", "extra MiB", "gate")


def _range(values: list[float], pattern: str) -> str:
    """Median and quartiles; of a single value that alone."""
    median = format(statistics.median(values), pattern)
    if len(values) < 2:
        return f"{median} (1 round)"
    low, high = quartiles(values)
    return f"{median} [{low:{pattern}}, {high:{pattern}}]"


def cells(record: Record, row: Row) -> tuple[str, ...]:
    """The row's text, a cell for each of :data:`COLUMNS`."""
    name = row.subject if row.kind != "ours" else f"* {row.subject}"
    if row.status == "absent":
        return name, "absent", "", "", "", row.note
    percent = record.percent(row)
    extra = ""
    if row.extra_bytes is not None:
        extra = f"{row.extra_bytes / 2**20:.1f}"
        if row.accumulator_bytes:
            extra += f" ({row.accumulator_bytes / 2**20:.0f} of it float32 sums of dW)"
    facts = ", ".join(
        f"{key} {'none' if value is None else format(value, '.4g')}"
        for key, value in row.facts.items()
    )
    gate = "; ".join(part for part in (row.gate, facts, row.note) if part)
    return (
        name,
        _range([1e3 * s for s in row.seconds], ".4g") if row.seconds else row.status,
        _range(row.ratios, ".3g") if row.ratios and row.kind != "yardstick" else "",
        "" if percent is None else f"{percent:.0f}",
        extra,
        f"WRONG: {gate}" if row.status == "wrong" else gate,
    )


def _heading(group: str, rows: list[Row]) -> str:
    units = dict.fromkeys(row.unit for row in rows if row.unit)
    ceilings = dict.fromkeys(row.ceiling for row in rows if row.ceiling)
    parts = []
    if units:
        parts.append(f"unit: {', '.join(units)}")
    if ceilings:
        parts.append(f"ceiling: {', '.join(ceilings)}")
    logits = next((row.logits_bytes for row in rows if row.logits_bytes), None)
    if logits:
        parts.append(f"logits {logits / 2**20:.0f} MiB")
    return f"{group} ({'; '.join(parts)})" if parts else group


def growth_table(record: Record) -> list[tuple[str, ...]]:
    """A line for each subject: the exponents of its time and memory in each size."""
    axes = list(dict.fromkeys(g.axis for g in record.growth))
    lines: list[tuple[str, ...]] = []
    for problem, subject in dict.fromkeys((g.problem, g.subject) for g in record.growth):
        found = {g.axis: g for g in record.growth if (g.problem, g.subject) == (problem, subject)}
        line = [problem, subject]
        for axis in axes:
            one = found.get(axis)
            values = (one.time_exponent, one.memory_exponent) if one else (None, None)
            line += ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(tuple(line))
    if not lines:
        return []
    heads = [f"{what}, {axis}" for axis in axes for what in ("time", "memory")]
    return [("problem", "subject", *heads), *lines]


def _ceilings(record: Record) -> str:
    rates = (
        f"{name} {rate:.0f} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, rate in record.ceilings.items()
    )
    return "Ceilings measured in this run: " + ", ".join(rates) if record.ceilings else ""


def text(record: Record) -> str:
    """Plain tables, one a group; * marks what is ours."""
    out: list[str] = []
    for group, rows in record.groups().items():
        table = [COLUMNS, *(cells(record, row) for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS) - 1)]
        out += ["", _heading(group, rows)]
        for line in table:
            padded = (c.ljust(w) for c, w in zip(line[:-1], widths, strict=True))
            out.append("  " + "  ".join([*padded, line[-1]]).rstrip())
    table = growth_table(record)
    if table:
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        out += ["", "Growth: exponents k of size^k, by least squares in logarithms"]
        out += [
            "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
    if record.ceilings:
        out += ["", _ceilings(record)]
    if any(row.status == "measured" for row in record.rows):
        behind = record.behind()
        out += ["", "Where ours is not the fastest:" + ("" if behind else " nowhere")]
        out += [f"  {line}" for line in behind]
    if note := state(record):
        out += ["", note]
    return "\n".join(out)


def markdown(record: Record) -> str:
    facts = record.environment
    versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items() if v)
    selected = "".join(f" --select {name}" for name in record.selection)
    commit = str(facts.get("commit", "unknown"))[:12]
    commit += ", changed files" if facts.get("dirty") else ""
    out = [
        "# Benchmarks" + (" (quick: these figures mean nothing)" if record.quick else ""),
        "",
        f"`vcore bench{selected}`; commit {commit}; "
        f"{facts.get('gpu') or facts.get('processor', '')} "
        f"({' '.join(facts.get('instructions', []))}), {facts.get('threads')} threads; Python "
        f"{facts.get('python')}, {versions}; {record.seconds / 60:.1f} minutes.",
        *(["", f"**{note}**"] if (note := state(record)) else []),
        "",
        "Times are medians over rounds with their quartiles. A round of a subject begins with the "
        "unit, so that *x unit* is a median of ratios of neighbours, which a busy machine changes "
        "little. *% of ceiling*: the arithmetic or the traffic that the task asks for, over the "
        "time, of the fastest product or copy of PyTorch's in this run. *extra MiB*: the peak "
        "beyond inputs and what is returned, float32 sums of a gradient included. *gate*: the "
        "check that came before any timing, with the relative errors. * is ours.",
        "",
        _ceilings(record),
    ]
    for group, rows in record.groups().items():
        lines = [_escaped(cells(record, row)) for row in rows]
        out += ["", f"## {_heading(group, rows)}", "", *markdown_table(COLUMNS, lines)]
    table = growth_table(record)
    if table:
        out += ["", "## Growth: exponents k of size^k", "", *markdown_table(table[0], table[1:])]
    behind = record.behind()
    out += ["", "## Where ours is not the fastest", ""]
    out += [f"- {line}" for line in behind] or ["Nowhere in this run."]
    return "\n".join(out) + "\n"


def _escaped(line: tuple[str, ...]) -> list[str]:
    return [cell.replace("|", "/").replace("* ", "\\* ", 1) for cell in line]


def state(record: Record) -> str:
    """What keeps the record from being that of a whole run without a failure; empty if nothing."""
    parts = [f"Not all of it ran: {'; '.join(record.missing)}."] if record.missing else []
    if record.exit_status:
        parts.append(f"pytest ended with exit status {record.exit_status}.")
    return " ".join(parts)


def write(record: Record, folder: Path) -> list[Path]:
    """``NAME.json``, ``NAME.md`` and ``NAME-roofline.png`` in ``folder``; see :func:`file_name`.

    The picture needs matplotlib and a row with a time, and is left out otherwise; one of an earlier
    run is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(record)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    record.write(paths[0])
    paths[1].write_text(markdown(record), encoding="utf-8")
    picture = folder / f"{name}-roofline.png"
    picture.unlink(missing_ok=True)
    try:
        from vcore_train.bench_roofline import plot
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return paths
    if plot(record, picture):
        paths.append(picture)
    return paths


def file_name(record: Record) -> str:
    """Of quick, device and selection; ``-partial`` at the end where not all of that ran, so that
    the record of a whole run stays.
    """
    gpu = record.environment.get("gpu")
    device = "cpu" if not gpu else str(gpu).lower().replace(" ", "-").replace("/", "-")
    parts = ["bench", *(["quick"] if record.quick else []), device, *record.selection]
    return "-".join(parts if record.complete else [*parts, "partial"])
