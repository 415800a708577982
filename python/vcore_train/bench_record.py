"""What ``pytest benchmarks/`` measures, as a record that can be written, read and compared.

Times are compared as ratios to a yardstick that ran beside the subject in the same round (for the
head one matrix product), so that a machine that is busy for a while slows both.
"""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Kind = Literal["ours", "peer", "yardstick"]
# "checked": the results are right and no time was taken; "absent": `note` says why; "wrong": the
# gate did not let it pass, so that it was not timed.
Status = Literal["measured", "checked", "absent", "wrong"]
FORMAT = "vcore bench 1"
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "peft", "pytest-benchmark"),
    *("cut-cross-entropy", "liger-kernel", "quack-kernels"),
)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one value twice that value."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


@dataclass
class Row:
    """One subject on one problem. Whatever was not measured is None or empty."""

    group: str  # the problem: rows of a group do the same and compare
    subject: str
    kind: Kind = "peer"
    status: Status = "checked"
    note: str = ""
    unit: str = ""  # the yardstick
    seconds: list[float] = field(default_factory=list)  # one a round
    unit_seconds: list[float] = field(default_factory=list)  # of the yardstick in the same rounds
    flops: float | None = None  # that the task asks for, however it is done
    bytes: float | None = None  # that must be read and written once, inputs and results
    ceiling: str = ""  # a name in Record.ceilings: what bounds the task
    extra_bytes: int | None = None  # peak beyond inputs and what is returned
    accumulator_bytes: int = 0  # float32 sums of a gradient, counted in extra_bytes
    logits_bytes: int | None = None  # of the logits in the inputs' dtype, for comparison
    gate: str = ""  # how the results were checked, with the errors
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratios(self) -> list[float]:
        """The time in units of the yardstick's, one a round."""
        return [a / b for a, b in zip(self.seconds, self.unit_seconds, strict=True)]

    @property
    def units(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None


@dataclass
class Growth:
    """How one subject's time and memory grow with one size, the others fixed."""

    problem: str
    subject: str
    kind: Kind
    axis: str
    sizes: list[int]
    seconds: list[float]  # medians
    extra_bytes: list[int] = field(default_factory=list)

    @property
    def time_exponent(self) -> float | None:
        return exponent(self.sizes, self.seconds)

    @property
    def memory_exponent(self) -> float | None:
        return exponent(self.sizes, self.extra_bytes)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """k of ``values ~ sizes**k`` by least squares in logarithms; None without positive values."""
    if len(values) != len(sizes) or len(sizes) < 2 or min(values) <= 0:
        return None
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    return statistics.linear_regression(x, y).slope


@dataclass
class Record:
    """All that one run has found."""

    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)  # GFLOP/s; GB/s of the copy
    rows: list[Row] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    seconds: float = 0.0
    quick: bool = False

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def groups(self) -> dict[str, list[Row]]:
        """The rows by group: yardstick, ours, peers; those without a time last."""
        order = {"yardstick": 0, "ours": 1, "peer": 2}
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, []).append(row)
        return {
            group: sorted(rows, key=lambda r: (r.status == "absent", order[r.kind]))
            for group, rows in grouped.items()
        }

    def rate(self, row: Row) -> float | None:
        """GFLOP/s where a product bounds the task, GB/s where a copy does."""
        work = row.bytes if row.ceiling == "copy" else row.flops
        return work / row.seconds_median / 1e9 if work and row.seconds else None

    def percent(self, row: Row) -> float | None:
        """Of the ceiling measured in this run. Above 100: faster than PyTorch's own product."""
        rate, ceiling = self.rate(row), self.ceilings.get(row.ceiling)
        return 100 * rate / ceiling if rate and ceiling else None

    def raise_ceiling(self, name: str, rate: float) -> None:
        self.ceilings[name] = max(rate, self.ceilings.get(name, 0.0))

    def behind(self) -> list[str]:
        """Each of our rows that is not as fast as a peer of its group, and by how much."""
        lines = []
        for group, rows in self.groups().items():
            peers = [r for r in rows if r.kind == "peer" and r.units and r.status == "measured"]
            if not peers:
                continue
            best = min(peers, key=lambda r: r.units or math.inf)
            for row in rows:
                if row.kind != "ours" or not row.units or not best.units:
                    continue
                if row.units / best.units >= 1.005:
                    lines.append(
                        f"{group}: {row.subject} takes {row.units / best.units:.2f} x the time of "
                        f"{best.subject}"
                    )
        return lines

    def failures(self) -> list[str]:
        """Our own results that are wrong."""
        return [
            f"{row.group}: {row.subject}: {row.gate}"
            for row in self.rows
            if row.kind == "ours" and row.status == "wrong"
        ]

    def write(self, path: Path) -> None:
        data = {"format": FORMAT, **asdict(self)}
        path.write_text(json.dumps(_rounded(data), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in ``path``; ValueError where there is none."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no record of vcore bench: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise ValueError(
                f"{path}: no record of vcore bench of this version (format {FORMAT!r}). "
                "Make one with: vcore bench --out DIR"
            )
        data["rows"] = [_made(Row, row) for row in data["rows"]]
        data["growth"] = [_made(Growth, row) for row in data["growth"]]
        return _made(cls, data)


def _made(kind: type, data: dict[str, Any]) -> Any:
    """The dataclass from what is known of ``data``."""
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in data.items() if name in known})


def _rounded(value: Any) -> Any:
    """Floats to six digits, so that files stay small."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def environment(root: Path) -> dict[str, Any]:
    """Commit, versions and hardware of this process; ``root`` is the source checkout."""
    import torch

    from vcore_train.info import FEATURES, cpu_features

    versions = {name: _version(name) for name in PACKAGES}
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    model = (line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line)
    has = cpu_features(text)
    return {
        "commit": _git(root, "rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": next(model, platform.processor()),
        "instructions": [name for name in FEATURES if has[name]],
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
