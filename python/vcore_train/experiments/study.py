"""Runs one study from its options to its files."""

import importlib
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vcore_train.experiments import STUDIES
from vcore_train.experiments.report import show, write_report
from vcore_train.experiments.setting import Context


@dataclass(frozen=True)
class StudyOptions:
    """The options of ``vcore experiment NAME``; None is the study's own choice."""

    out: Path
    data: Path | None = None
    eval_data: Path | None = None
    seeds: int | None = None
    quick: bool = False
    threads: int | None = None
    overwrite: bool = False

    def command(self, name: str) -> str:
        words: list[Any] = ["vcore", "experiment", name]
        for option, value in (
            ("--data", self.data and self.data.name),
            ("--eval-data", self.eval_data and self.eval_data.name),
            ("--seeds", self.seeds),
            ("--threads", self.threads),
        ):
            words += [] if value is None else [option, value]
        return shlex.join(map(str, [*words, *(["--quick"] if self.quick else [])]))


def run_study(name: str, options: StudyOptions, console: Console) -> dict[str, Any]:
    """Measures, writes ``NAME.json``, ``NAME.md``, ``NAME.png`` and the CSV, prints the tables.

    Returns what the JSON holds. User mistakes raise ValueError or OSError before any training.
    """
    _check(name, options)
    study = importlib.import_module(f"vcore_train.experiments.{name}")
    setting = study.QUICK if options.quick else study.FULL
    if options.seeds is not None:
        setting = replace(setting, seeds=options.seeds)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    with _progress(console) as progress:
        context = Context(setting, options.out, options.data, options.eval_data, progress)
        result = study.measure(context)
    tables: Sequence[Any] = study.tables(result)
    study.plot(result, options.out / f"{name}.png")
    reading = study.reading(result) if hasattr(study, "reading") else []
    record = write_report(
        name,
        STUDIES[name],
        result,
        tables,
        options.out,
        records=study.records(result) if hasattr(study, "records") else [],
        reading=reading,
        command=options.command(name),
        setting=asdict(setting),
        data=options.data.name if options.data else getattr(study, "DATA", "generated arithmetic"),
        seconds=time.perf_counter() - wall,
        cpu_seconds=_cpu_seconds() - cpu,
    )
    show(tables, console)
    if reading:
        console.print(" ".join(reading))
    if options.quick:
        console.print("--quick: the figures only show that everything runs.")
    console.print(f"{name}.md, .png and the figures: [bold]{options.out}[/]", soft_wrap=True)
    return record


def _check(name: str, options: StudyOptions) -> None:
    for flag, path in (("--data", options.data), ("--eval-data", options.eval_data)):
        if path is not None and not path.exists():
            raise FileNotFoundError(
                f"{flag} {path}: no such file. Expected a JSONL file of prompts and responses; "
                "without --data, arithmetic problems are generated."
            )
    if options.eval_data is not None and options.data is None:
        raise ValueError("--eval-data means nothing without --data: pass --data too, or drop it.")
    for flag, value in (("--seeds", options.seeds), ("--threads", options.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}.")
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out {options.out}: is a file, expected a folder.")
    if (options.out / f"{name}.json").exists() and not options.overwrite:
        raise ValueError(
            f"--out {options.out} holds {name}.json of an earlier run. Replace it with "
            "--overwrite, or choose another --out."
        )


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
