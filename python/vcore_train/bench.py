"""``vcore bench``: the benchmark suite of a source checkout, run by pytest."""

import importlib.util
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vcore_train.bench_record import Record

SUITE = "benchmarks"
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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

    A signal is passed on to pytest, which writes what it has after SIGINT; 128 + its number then.

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
    return _passing_signals(command, root)


def _passing_signals(command: Sequence[str], folder: Path) -> int:
    """Runs ``command`` to its end; its exit code, or 128 + the number of the first signal."""
    got: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: Any) -> None:
        got.append(number)
        if child is not None:
            child.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        before = {n: signal.getsignal(n) for n in PASSED_ON}
        before = {n: old for n, old in before.items() if old != signal.SIG_IGN}  # as under nohup
        for number in before:
            signal.signal(number, pass_on)
    try:
        # In a session of its own: a terminal sends Ctrl-C to all of a process group, and a second
        # SIGINT would stop pytest while it writes.
        child = subprocess.Popen(command, cwd=folder, start_new_session=True)
        for early in got:  # before there was a child
            child.send_signal(early)
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if got:
        return 128 + got[0]
    return code if code >= 0 else 128 - code


def note_run(record: Record, reporter: Any, exit_status: int) -> None:
    """Notes in ``record`` which suites pytest was asked for, and what kept tests of theirs from
    running or being timed.

    Args:
        reporter: pytest's terminal reporter, at ``pytest_terminal_summary``.
    """
    config = reporter.config
    every = {name: path.resolve() for name, path in suites(config.rootpath).items()}
    asked: dict[str, bool] = {}  # whether all tests of the suite
    for argument in config.args:
        path, _, test = str(argument).partition("::")
        given = (config.invocation_params.dir / path).resolve()
        for name, file in every.items():
            if given in (file, *file.parents):
                asked[name] = not test or asked.get(name, False)
    session = config.pluginmanager.get_plugin("session")
    found = {Path(item.location[0]).stem.removeprefix("bench_") for item in session.items}
    ran = {
        report.nodeid
        for outcome, reports in reporter.stats.items()
        for report in reports
        if outcome and getattr(report, "when", "collect") != "collect"
    }
    deselected = len(reporter.stats.get("deselected", []))
    record.selection = [] if len(asked) == len(every) else sorted(asked)
    record.exit_status = int(exit_status)
    record.missing = [f"some tests of {name} alone" for name, all_ in asked.items() if not all_]
    record.missing += [f"no test of {name}" for name in asked if name not in found]
    if deselected:
        record.missing.append(f"{deselected} tests deselected")
    if len(ran) < session.testscollected:
        record.missing.append(f"{len(ran)} of {session.testscollected} tests ran")
    if exit_status > 1:  # 0: all passed, 1: some failed
        record.missing.append("interrupted" if exit_status == 2 else "an error of pytest")
    if config.getoption("benchmark_disable"):
        record.missing.append("nothing was timed (--benchmark-disable)")
