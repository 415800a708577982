"""What an evaluation leaves: ``results.json``, a file of samples for each task, a table."""

import json
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = "results.json"
SAMPLES = "samples_{task}.jsonl"
WIDEST = 140  # characters
PACKAGES = ("torch", "transformers", "peft", "datasets", "lm_eval", "vcore_kernels")
# Of a sample, what a later comparison or a look at the responses needs.
KEPT = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "metrics", "resps")


def claim(out: Path, *, overwrite: bool) -> None:
    """Raises ValueError where the folder cannot be written or holds results already."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder.")
    if (out / RESULTS).exists() and not overwrite:
        raise ValueError(
            f"{out} holds the results of an evaluation. Replace them with --overwrite, or choose "
            "another --out."
        )


def record(found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``results.json`` from what the harness returns."""
    config = found["config"]
    groups = {name: list(tasks) for name, tasks in found["group_subtasks"].items() if tasks}
    tasks = {}
    for name, values in found["results"].items():
        counts = found["n-samples"].get(name, {})
        tasks[name] = {
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "problems": counts.get("effective", values.get("sample_len")),
            "problems_of_all": counts.get("original"),
            "generation": found["configs"].get(name, {}).get("generation_kwargs"),
            "dataset": found["configs"].get(name, {}).get("dataset_path"),
            "metrics": _metrics(values),
        }
    model = {
        "name": settings["model"],
        "adapter": settings["adapter"],
        "backend": settings["backend"],
        "parameters": config.get("model_num_parameters"),
        "dtype": str(config.get("model_dtype", settings["dtype"])),
        "revision": config.get("model_sha") or None,
        "adapter_revision": config.get("peft_sha") or None,
    }
    return _plain(
        {
            "model": model,
            "settings": {key: _text(value) for key, value in settings.items()},
            "harness": {"name": "lm-evaluation-harness", "version": _version("lm_eval")},
            "versions": {name: _version(name) for name in PACKAGES},
            "commit": commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "groups": groups,
            "tasks": tasks,
        }
    )


def _metrics(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key, value in values.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{filter_name}")
        rows.append(
            {
                "metric": name,
                "filter": filter_name,
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
            }
        )
    return rows


def write(out: Path, record: Mapping[str, Any], samples: Mapping[str, Sequence[Any]]) -> None:
    """``results.json``, and ``samples_TASK.jsonl`` with a row a problem and filter."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(SAMPLES.format(task="*")):
        old.unlink()
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (out / RESULTS).write_text(text + "\n", encoding="utf-8")
    for task, rows in samples.items():
        path = out / SAMPLES.format(task=task)
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(_plain(_sample(row)), ensure_ascii=False) + "\n")


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: row[name] for name in KEPT if name in row}
    kept["values"] = {name: row[name] for name in row["metrics"]}
    kept["prompt"] = row["arguments"][0][0]
    del kept["metrics"]
    return kept


def read(folder: Path) -> dict[str, Any]:
    """The content of a folder's ``results.json``; raises ValueError or FileNotFoundError."""
    path = folder / RESULTS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{folder}: no {RESULTS} there. Expected the --out folder of an evaluation."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error.msg}).") from error


def read_samples(folder: Path, task: str) -> list[dict[str, Any]]:
    path = folder / SAMPLES.format(task=task)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: not there, and a comparison needs it. Evaluate without --no-save-samples."
        ) from error
    return [json.loads(line) for line in lines]


def show(record: Mapping[str, Any], console: Console) -> None:
    """A line for each metric; of a group, for the group alone."""
    table = Table(box=None)
    table.add_column("task", no_wrap=True)
    for column in ("n", "shots"):
        table.add_column(column, justify="right")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("standard error", justify="right", no_wrap=True)
    inside = {task for tasks in record["groups"].values() for task in tasks}
    for name, task in record["tasks"].items():
        if name in inside:
            continue
        for row in task["metrics"]:
            plain = row["filter"] in ("none", "all")
            table.add_row(
                name,
                str(task["problems"]),
                "" if task["num_fewshot"] is None else str(task["num_fewshot"]),
                row["metric"] if plain else f"{row['metric']} ({row['filter']})",
                percent(row["value"]),
                "" if row["stderr"] is None else percent(row["stderr"]),
            )
    print_wide(table, record["model"]["name"], console)


def print_wide(table: Table, title: str, console: Console) -> None:
    """A table with all its columns, also where the terminal is narrow."""
    console.print(title, soft_wrap=True, style="bold")
    if not console.quiet:
        Console(file=console.file, width=max(console.width, WIDEST)).print(table)


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def commit() -> str | None:
    """The commit of the source checkout that this package runs from, with + where it is changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+" if changed else head


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite become None, anything strange its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return _plain(value.item()) if hasattr(value, "item") else str(value)
