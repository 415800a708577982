"""What an evaluation leaves: ``results.json``, a file of samples for each task, a table."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vcore_train.plain import plain
from vcore_train.provenance import commit, version, versions

FORMAT = "vcore eval 1"
AGAIN = "Evaluate once more, after removing it."
RESULTS = "results.json"
SAMPLES = "samples_{task}.jsonl"
WIDEST = 140  # characters
PACKAGES = ("torch", "transformers", "peft", "datasets", "lm_eval", "vcore_kernels")
# Of a sample, what a later comparison or a look at the responses needs.
KEPT = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "metrics", "resps")


def claim(out: Path, *, overwrite: bool, data: str | None = None) -> None:
    """Raises ValueError or OSError where results cannot be written to the folder, or where that
    would cost a file: earlier results, samples that are not theirs, the input ``data``.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder.")
    if (out / RESULTS).exists() and not overwrite:
        raise ValueError(
            f"{out} holds the results of an evaluation. Replace them with --overwrite, or choose "
            "another --out."
        )
    earlier = _earlier(out)
    named = RESULTS, SAMPLES.format(task="*")
    ours = sorted(path for name in named for path in out.glob(name))
    if data is not None and Path(data).resolve() in [path.resolve() for path in ours]:
        raise ValueError(
            f"--data {data}: an evaluation would write over it. Choose another --out, or move it."
        )
    for path in ours:
        if path.name not in earlier:
            raise ValueError(
                f"{path}: no {RESULTS} beside it names it, so it would pass for a part of the new "
                "results. Move it, or choose another --out."
            )
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written ({error.strerror}).") from error
    finally:  # nothing stays of an evaluation that has not begun
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _earlier(out: Path) -> set[str]:
    """The files of the evaluation that a folder holds."""
    if not (out / RESULTS).exists():
        return set()
    try:
        tasks = read(out)["tasks"]
    except ValueError as error:
        raise ValueError(f"{error} Or choose another --out.") from error
    return {RESULTS, *(SAMPLES.format(task=task) for task in tasks)}


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
            "problems_of_all": sum(
                found["n-samples"][leaf]["original"] for leaf in leaves(name, groups)
            ),
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
    return plain(
        {
            "format": FORMAT,
            "model": model,
            "settings": {key: _text(value) for key, value in settings.items()},
            "harness": {"name": "lm-evaluation-harness", "version": version("lm_eval")},
            "versions": versions(PACKAGES),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "groups": groups,
            "tasks": tasks,
        }
    )


def leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, or the one task."""
    if name not in groups:
        return [name]
    return [leaf for child in groups[name] for leaf in leaves(child, groups)]


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
    """``results.json``, and ``samples_TASK.jsonl`` with a row a problem and filter.

    They replace those of the folder's earlier evaluation, once all of them are written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (Path(folder) / RESULTS).write_text(text + "\n", encoding="utf-8")
        names = []
        for task, rows in samples.items():
            names.append(SAMPLES.format(task=task))
            with (Path(folder) / names[-1]).open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(plain(_sample(row)), ensure_ascii=False) + "\n")
        # results.json goes first and comes last: where it is, its samples are.
        for old in sorted(_earlier(out) - set(names)):
            (out / old).unlink(missing_ok=True)
        for name in (*names, RESULTS):
            os.replace(Path(folder) / name, out / name)


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
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{folder}: no {RESULTS} there. Expected the --out folder of an evaluation."
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: not valid JSON ({error}). {AGAIN}") from error
    form = found.get("format") if isinstance(found, dict) else None
    if form != FORMAT:
        raise ValueError(
            f"{path}: not results as this version of vcore eval writes them (its format is "
            f"{form!r}, expected {FORMAT!r}). {AGAIN}"
        )
    for name in ("model", "settings", "harness", "groups", "tasks"):
        if not isinstance(found.get(name), dict):
            raise ValueError(f"{path}: {name!r} is missing, or not an object. {AGAIN}")
    for name, task in found["tasks"].items():
        if not isinstance(task, dict) or not {"version", "problems", "metrics"} <= task.keys():
            raise ValueError(f"{path}: task {name!r} is no record of a task. {AGAIN}")
    return found


def read_samples(folder: Path, task: str, problems: int | None = None) -> list[dict[str, Any]]:
    """The rows of ``samples_TASK.jsonl``, of at least so many ``problems``.

    Raises FileNotFoundError, or ValueError with the file and the line.
    """
    path = folder / SAMPLES.format(task=task)
    try:
        with path.open("rb") as lines:  # text would also be cut at U+2028, inside a response
            rows = [_row(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: not there, and a comparison needs it. Evaluate without --no-save-samples."
        ) from error
    found = len({row["doc_id"] for row in rows})
    if problems is not None and found < problems:
        raise ValueError(f"{path}: has {found} of {problems} problems, it was cut. {AGAIN}")
    return rows


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{where}: not a sample of vcore eval ({error}). {AGAIN}") from error
    for name, kind in (("doc_id", int), ("doc_hash", str), ("filter", str), ("values", dict)):
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ValueError(
                f"{where}: not a sample of vcore eval (no {name!r} of type {kind.__name__}). "
                f"{AGAIN}"
            )
    return row


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
                escape(name),
                str(task["problems"]),
                "" if task["num_fewshot"] is None else str(task["num_fewshot"]),
                row["metric"] if plain else f"{row['metric']} ({row['filter']})",
                "none" if row["value"] is None else percent(row["value"]),
                "" if row["stderr"] is None else percent(row["stderr"]),
            )
    print_wide(table, record["model"]["name"], console)


def print_wide(table: Table, title: str, console: Console) -> None:
    """A table with all its columns, also where the terminal is narrow."""
    console.print(title, soft_wrap=True, style="bold", markup=False)
    if not console.quiet:
        Console(file=console.file, width=max(console.width, WIDEST)).print(table)


def percent(value: float) -> str:
    return f"{100 * value:.2f}%"


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
