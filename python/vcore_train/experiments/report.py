"""What a study leaves behind: NAME.json with all figures, NAME.md with its tables, NAME.png; where
the study has records, NAME.csv.
"""

import csv
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import rich.table
import torch
from matplotlib.figure import Figure
from rich.console import Console

from vcore_train import provenance
from vcore_train.plain import markdown_table, plain
from vcore_train.plots import STYLE

PACKAGES = ("vcore_kernels", "torch", "transformers", "peft")
DIGITS = 6  # of the floats in files


@dataclass(frozen=True)
class Table:
    """A title, headings and rows of text; the columns after the first ``text`` hold numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    note: str = ""

    def rich(self) -> rich.table.Table:
        table = rich.table.Table(title=self.title, title_justify="left", caption=self.note or None)
        table.caption_justify = "left"
        for place, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if place < self.text else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = markdown_table(self.headings, self.rows, self.text)
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])])


def write_report(
    name: str,
    question: str,
    result: dict[str, Any],
    tables: Sequence[Table],
    out: Path,
    *,
    records: Sequence[dict[str, Any]] = (),
    reading: Sequence[str] = (),
    command: str,
    setting: dict[str, Any],
    data: str,
    seconds: float,
    cpu_seconds: float,
) -> dict[str, Any]:
    """Writes ``out/name.json`` and ``out/name.md``; returns what is in the JSON.

    ``result``: plain data; tensors must have become numbers. The file keeps six
    digits, and null for NaN and infinities. ``records``: rows of ``out/name.csv``, which have the
    same keys. ``reading``: sentences on what the figures say, a paragraph of the Markdown.
    """
    record = {
        "study": name,
        "command": command,
        "data": data,
        "setting": setting,
        "versions": versions(),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "result": result,
    }
    text = json.dumps(plain(record, DIGITS), indent=1, allow_nan=False)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    size = ", ".join(f"{key} {value}" for key, value in setting.items())
    parts = [
        f"# {name}: {question}",
        f"![{name}]({name}.png)",
        *([" ".join(reading)] if reading else []),
        *(table.markdown() for table in tables),
        f"`{command}`; data: {data}; {size}; {seconds / 60:.1f} minutes ({cpu_seconds / 60:.1f} of "
        f"CPU time) with {torch.get_num_threads()} threads; "
        + ", ".join(f"{package} {version}" for package, version in versions().items())
        + ". ± is the half-width of a 95% t interval over seeds.",
    ]
    (out / f"{name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if records:
        with open(out / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(plain(list(records), DIGITS))
    return record


def show(tables: Sequence[Table], console: Console) -> None:
    for table in tables:
        console.print(table.rich())
        console.print()


@contextmanager
def figure(
    path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """A figure in the style of the other plots and its axes, as ``plt.subplots`` gives them.

    Saved as ``path`` on leaving, closed in any case.
    """
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=size, **options)
        try:
            yield drawn, axes
            drawn.savefig(path)
        finally:
            plt.close(drawn)


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, where they are installed."""
    found = provenance.versions(PACKAGES)
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v}}
