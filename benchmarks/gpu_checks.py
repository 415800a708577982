"""The steps before any figure: building the compiled part, the gpu-marked tests, memcheck."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
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


def _collect(limit: float) -> list[str]:
    """The gpu-marked tests by name."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "tests/kernels"],
        cwd=ROOT,
        timeout=limit,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = done.stdout.splitlines()
    return [line for line in lines if "::" in line and not line.startswith("ERROR")]


def run_tests(limit: float, processes: int | None = None) -> dict:
    """The gpu-marked tests, dealt out to several processes: most of their time is compilation.

    Returns counts, what failed, and how many tests have no result because the time ran out.
    """
    begin = time.monotonic()
    processes = processes or max(1, min(12, (os.cpu_count() or 2) * 3 // 4))
    try:
        names = _collect(limit)
    except subprocess.TimeoutExpired:
        names = []
    hands = [names[first::processes] for first in range(min(processes, len(names)))]
    totals = {"collected": len(names), "passed": 0, "failed": 0, "skipped": 0, "no result": 0}
    failures: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as scratch:

        def play(number: int) -> str:
            command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line"]
            log = Path(scratch) / f"{number}.log"
            with open(log, "w") as file:
                try:
                    subprocess.run(
                        [*command, *hands[number]],
                        cwd=ROOT,
                        timeout=max(1.0, limit - (time.monotonic() - begin)),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "400"},
                    )
                except subprocess.TimeoutExpired:
                    file.write("\nno time left\n")
            return log.read_text(errors="replace")

        with ThreadPoolExecutor(len(hands) or 1) as pool:
            logs = list(pool.map(play, range(len(hands))))
    for log in logs:
        for name, outcome in re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", log, re.M):
            totals[{"ERROR": "failed"}.get(outcome, outcome.lower())] += 1
            if outcome in ("FAILED", "ERROR"):
                # the line of the summary behind the name
                match = re.search(rf"^{outcome} {re.escape(name)} - (.+)$", log, re.M)
                failures.append({"test": name, "message": match[1][:300] if match else ""})
    totals["no result"] = len(names) - totals["passed"] - totals["failed"] - totals["skipped"]
    report = {**totals, "failures": failures}
    if not names or totals["no result"]:
        report["last lines"] = [" | ".join(_output_tail(log, 3)) for log in logs]
    return report


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
