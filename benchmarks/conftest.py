"""The suite's options, its fixtures, and the table at the end.

python -m pytest benchmarks/ --benchmark-only [--quick] [--bench-out DIR] [--bench-minutes M]
"""

import time
from pathlib import Path

import pytest
from vcore_train import bench_report
from vcore_train.bench import note_run
from vcore_train.bench_record import Record, environment

from benchmarks.suite import Bench, default_device, measure_ceilings

ROOT = Path(__file__).resolve().parents[1]
RECORD = pytest.StashKey[Record]()
BEGIN = pytest.StashKey[float]()
UNITS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("vcore benchmarks")
    group.addoption("--quick", action="store_true", help="tiny shapes: the figures mean nothing")
    group.addoption("--bench-out", help="folder for the record, its table and its roofline")
    group.addoption(
        "--bench-minutes",
        type=float,
        default=7,
        help="after so many, subjects get the fewest rounds (default: 7)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if not any(str(a).startswith("--benchmark-columns") for a in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]
    # Where a gate stops a test; a cut-short run still leaves its record.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.stash[RECORD] = Record(quick=bool(config.getoption("--quick")))
    config.stash[BEGIN] = time.monotonic()
    config.stash[UNITS] = {}


@pytest.fixture(scope="session")
def device():
    return default_device()


@pytest.fixture(scope="session")
def quick(pytestconfig):
    return bool(pytestconfig.getoption("--quick"))


@pytest.fixture(scope="session")
def _ceilings(pytestconfig, device):
    """Measured before the first subject and after the last: the better of the two counts."""
    record = pytestconfig.stash[RECORD]
    record.environment = environment(ROOT)
    timed = not pytestconfig.getoption("--benchmark-disable")
    if timed:
        measure_ceilings(record, device)
    yield
    if timed:
        measure_ceilings(record, device)


@pytest.fixture
def bench(benchmark, pytestconfig, device, _ceilings):
    stash = pytestconfig.stash
    late = time.monotonic() - stash[BEGIN] > 60 * pytestconfig.getoption("--bench-minutes")
    return Bench(benchmark, stash[RECORD], device, stash[UNITS], late)


@pytest.hookimpl(trylast=True)  # after pytest-benchmark's own tables
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    record = config.stash[RECORD]
    if not record.rows and not record.growth:
        return
    record.seconds = time.monotonic() - config.stash[BEGIN]
    note_run(record, terminalreporter, exitstatus)
    for row in record.rows:  # a product of the suite may be faster than the square one
        gemm = row.kind == "yardstick" and row.ceiling.endswith("GEMM")
        if gemm and (rate := record.rate(row)):
            record.raise_ceiling(row.ceiling, rate)
    terminalreporter.section("vcore benchmarks (* is ours)")
    terminalreporter.write_line(bench_report.text(record))
    if record.failures():
        terminalreporter.write_line("\nWrong results of ours:", red=True)
        for line in record.failures():
            terminalreporter.write_line(f"  {line}", red=True)
    folder = config.getoption("--bench-out")
    if folder:
        for path in bench_report.write(record, Path(folder)):
            terminalreporter.write_line(f"written: {path}")
