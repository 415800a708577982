"""What a training run leaves and shows: a JSON line for every log, step times, a progress bar."""

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback


class MetricsFile:
    """Appends JSON objects to a file, one a line; numbers that are not finite become null.

    The file is first touched by the first line. ``rows``: the earlier lines that are kept.
    """

    def __init__(self, path: Path, *, keep_up_to: int | None = None):
        """``keep_up_to``: keep the earlier lines up to this step; None starts the file anew."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._begun = False
        if keep_up_to is not None:
            self.rows = [row for row in read_metrics(path) if _step(row, path) <= keep_up_to]

    def append(self, row: Mapping[str, Any]) -> None:
        line = f"{json.dumps({name: _finite(value) for name, value in row.items()})}\n"
        if self._begun:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        kept = "".join(f"{json.dumps(row)}\n" for row in self.rows)
        written = self.path.with_name(f"{self.path.name}.tmp")
        written.write_text(kept + line, encoding="utf-8")
        os.replace(written, self.path)
        self._begun = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; [] where there is none.

    A last line that is cut off, as a killed process leaves it, is left out. Raises ValueError with
    the line for any other that is not a JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    rows = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == last:
                break
            raise ValueError(
                f"{path}, line {number + 1}: not valid JSON ({error.msg}). Repair or remove it."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number + 1}: expected a JSON object, got {row!r}.")
        rows.append(row)
    return rows


def _step(row: Mapping[str, Any], path: Path) -> int:
    step = row.get("step")
    if not isinstance(step, int):
        raise ValueError(f"{path}: a line has no number as its step: {json.dumps(row)[:80]}")
    return step


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog(TrainerCallback):
    """Collects the figures of one training run, and shows its progress.

    ``rows``: everything logged, each with its ``step``; first the lines that ``file`` kept.
    ``seconds``: wall-clock time of each optimizer step, probing included, saving and evaluation
    not.
    """

    def __init__(
        self,
        label: str,
        *,
        console: Console,
        file: MetricsFile | None = None,
        extra: Mapping[str, Any] | None = None,
        figures: Sequence[str] = ("nll", "kl", "ess", "alpha"),
    ):
        """``figures``: what of a line of training is shown."""
        self.figures = figures
        self.label, self.console, self.file, self.extra = label, console, file, dict(extra or {})
        self.rows: list[dict[str, Any]] = list(file.rows) if file is not None else []
        self.seconds: list[float] = []
        self._began = 0.0
        self._told = 0
        self._progress: Progress | None = None

    @property
    def median_seconds(self) -> float:
        """Median time of a step; the first of many steps, which warms caches up, does not count."""
        counted = self.seconds[1:] or self.seconds
        return statistics.median(counted) if counted else math.nan

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values at which ``name`` was logged."""
        rows = [row for row in self.rows if row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.console.is_terminal or self.console.quiet:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            self.label, total=state.max_steps, completed=state.global_step, figures=""
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {**self.extra, "step": state.global_step, **(logs or {})}
        self.rows.append(row)
        if self.file is not None:
            self.file.append(row)
        if "loss" not in row:
            return
        figures = "  ".join(f"{name} {row[name]:.3g}" for name in self.figures if name in row)
        if self._progress is not None:
            self._progress.update(self._task, figures=figures)
        elif state.global_step * 10 // max(state.max_steps, 1) > self._told:  # a line every tenth
            self._told = state.global_step * 10 // max(state.max_steps, 1)
            self.console.print(
                f"{self.label:<9} step {state.global_step}/{state.max_steps}  {figures}"
            )

    @contextmanager
    def task(self, what: str, total: int) -> Iterator[Callable[[int], Any]]:
        """A second bar below that of the steps; the function that it gives moves it on."""
        progress = self._progress
        if progress is None:
            yield lambda steps: None
            return
        task = progress.add_task(what, total=total, figures="")
        try:
            yield lambda steps: progress.advance(task, steps)
        finally:
            progress.remove_task(task)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Ends the progress bar; after an exception too."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
