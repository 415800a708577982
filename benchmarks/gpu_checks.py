"""The steps before any figure: building the compiled part, the gpu-marked tests, memcheck."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _output_tail(output: str | bytes | None, lines: int = 30) -> list[str]:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text.strip().splitlines()[-lines:]


def build(limit: float) -> dict:
    """``setup.py build_ext --inplace``; a failure is reported and nothing else."""
    try:
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=ROOT,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        return {
            "built": False,
            "why": f"more than {limit:.0f} s",
            "log": _output_tail(error.stdout),
        }
    built = done.returncode == 0 and "were not built" not in done.stdout
    return {"built": built, "log": [] if built else _output_tail(done.stdout)}


def run_tests(limit: float, processes: int | None = None) -> dict:
    """The gpu-marked tests, a process for each file, as many at a time as the processors allow.

    Returns counts, the names of what failed, and the files that ran out of time.
    """
    begin = time.monotonic()
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    processes = processes or max(1, min(8, (os.cpu_count() or 2) // 2))
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    failures, unfinished = [], []
    with tempfile.TemporaryDirectory() as scratch:

        def run_file(file: Path) -> tuple[Path, Path, bool, list[str]]:
            left = limit - (time.monotonic() - begin)
            report = Path(scratch) / f"{file.stem}.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(file)]
            command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
            if left <= 1:
                return file, report, False, ["not begun"]
            try:
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    timeout=left,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            except subprocess.TimeoutExpired as error:
                return file, report, False, _output_tail(error.stdout, 3)
            # 5: no test of this file is marked gpu.
            return file, report, done.returncode in (0, 1, 5), _output_tail(done.stdout)

        with ThreadPoolExecutor(processes) as pool:
            results = list(pool.map(run_file, files))
        for file, report, finished, output in results:
            if not finished:
                unfinished.append({"file": file.name, "output": output})
            if not report.exists():
                continue
            for case in ElementTree.parse(report).iter("testcase"):
                outcome = "passed"
                for child in case:
                    if child.tag in ("failure", "error"):
                        outcome = "failed"
                        name = f"{file.name}::{case.get('name')}"
                        message = (child.get("message") or "").splitlines()
                        failures.append({"test": name, "message": message[0] if message else ""})
                    elif child.tag == "skipped":
                        outcome = "skipped"
                totals[outcome] += 1
    return {**totals, "failures": failures, "unfinished": unfinished}


def memcheck(limit: float) -> dict:
    """compute-sanitizer over the few tests that cover every kernel on ragged shapes."""
    tool = shutil.which("compute-sanitizer")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if tool is None and home and (candidate := Path(home, "bin/compute-sanitizer")).exists():
            tool = str(candidate)
    if tool is None:
        return {"ran": False, "why": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    command += ["tests/kernels/test_gpu.py", "-k", "ragged"]
    # Without PyTorch's own pool every tensor is an allocation whose bounds are known.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"ran": False, "why": f"more than {limit:.0f} s"}
    return {"ran": True, "clean": done.returncode == 0, "output": _output_tail(done.stdout, 8)}
