"""``vcore bench``: the benchmark suite of a source checkout, run by pytest."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SUITE = "benchmarks"


def checkout(start: Path | None = None) -> Path:
    """The source checkout that has the suite: where this package stands, or ``start`` (the working
    directory).
    """
    places = (Path(__file__).resolve().parents[2], (start or Path.cwd()).resolve())
    for place in places:
        if (place / SUITE / "conftest.py").is_file():
            return place
    raise ValueError(
        f"vcore bench: no {SUITE}/ with the suite, neither in {places[0]} nor in {places[1]}. It "
        "is part of the source repository alone: call vcore bench in a clone of it."
    )


def suites(root: Path) -> dict[str, Path]:
    """The files of the suite by what ``--select`` calls them."""
    found = sorted((root / SUITE).glob("bench_*.py"))
    return {path.stem.removeprefix("bench_"): path for path in found}


def run_suite(select: Sequence[str], *, quick: bool, out: Path | None) -> int:
    """Runs the suite and writes its record into ``out``; pytest's exit code.

    Raises:
        ValueError: no suite here, pytest is missing, an unknown name in ``select``.
    """
    root = checkout()
    missing = [
        name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ValueError(
            f"vcore bench: {' and '.join(missing)} not installed. Run: pip install -e '.[dev]'"
        )
    known = suites(root)
    unknown = [name for name in select if name not in known]
    if unknown:
        raise ValueError(
            f"--select must be one of {', '.join(known)}, got {', '.join(map(repr, unknown))}."
        )
    files = [str(known[name]) for name in dict.fromkeys(select)] or [str(root / SUITE)]
    folder = (out or root / SUITE / "results").resolve()
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", *files]
    command += ["--bench-out", str(folder), *(["--quick"] if quick else [])]
    return subprocess.run(command, cwd=root).returncode
