"""The files of a run of benchmarks/gpu.py: ``gpu-<name>.json`` and ``gpu-<name>.md``."""

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vcore_train.provenance import checkout_state

from benchmarks.measure import Bench, Figure
from benchmarks.peers import PEERS, package_version

DRY = "dry run, no figures"
ROOT = Path(__file__).resolve().parents[1]


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Commit, versions and hardware."""
    names = {"triton", "numpy"} | {peer.package for peer in PEERS if peer.package}
    head, changed = checkout_state(ROOT) or ("unknown", 0)
    found = {
        "commit": commit or head,
        "changed files": changed,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: package_version(name) for name in sorted(names)},
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["memory, GiB"] = round(properties.total_memory / 2**30, 1)
    else:
        found["device"] = "none: Triton's interpreter on a CPU"
    return found


def default_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "dry-run"
    return torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")


class Report:
    """Written anew after every step, so that a run that is cut short leaves what it has."""

    def __init__(self, folder: Path, name: str, facts: dict[str, Any], dry: bool):
        self.folder, self.name, self.facts, self.dry = folder, name, facts, dry
        self.checks: dict[str, Any] = {}
        self.tuning: list[dict[str, Any]] = []
        self.begin = time.monotonic()
        self.finished = False

    def write(self, bench: Bench) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"gpu-{self.name}.json").write_text(
            json.dumps(self.as_dict(bench), indent=1) + "\n"
        )
        (self.folder / f"gpu-{self.name}.md").write_text(self.as_markdown(bench))

    def as_dict(self, bench: Bench) -> dict[str, Any]:
        return {
            "status": DRY if self.dry else "complete" if self.finished else "cut short",
            "environment": self.facts,
            "seconds": None if self.dry else round(time.monotonic() - self.begin),
            "checks": self.checks,
            "failures": bench.failures,
            "ceilings": bench.ceilings,
            "absent": bench.absent,
            "figures": [asdict(figure) for figure in bench.figures],
            "tuning": self.tuning,
        }

    def as_markdown(self, bench: Bench) -> str:
        data = self.as_dict(bench)
        facts = self.facts
        versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
        lines = [
            f"# {facts['device']}" + (f": {DRY}" if self.dry else ""),
            "",
            f"{data['status'].capitalize()}. Commit {facts['commit'][:12]}"
            + (f" and {facts['changed files']} changed files" if facts["changed files"] else "")
            + f"; Python {facts['python']}, CUDA {facts['cuda']}, {versions}.",
            "Made by `python benchmarks/gpu.py`. Times are medians over interleaved rounds "
            "(quartiles in brackets), each also in units of a yardstick measured in the same "
            "rounds; *extra* is the peak of memory beyond inputs, results and the float32 "
            "accumulator of the head's gradient; *gate* is the largest error and what is allowed.",
        ]
        if bench.failures:
            lines += ["", "**Wrong results:**", *(f"* {text}" for text in bench.failures)]
        for name, check in self.checks.items():
            lines += ["", f"{name}: {_one_line(check)}"]
        for name, value in bench.ceilings.items():
            lines += ["", f"Ceiling: {name} {value:.0f}"]
        for section in dict.fromkeys(figure.section for figure in bench.figures):
            figures = [figure for figure in bench.figures if figure.section == section]
            lines += ["", f"## {section}", ""]
            for shape in dict.fromkeys(figure.shape for figure in figures):
                lines += [f"### {shape}", "", *_table([f for f in figures if f.shape == shape]), ""]
        if self.tuning:
            lines += ["", "## tuning", "", "| kernel | settings | ms | |", "|---|---|---|---|"]
            lines += [
                f"| {row['kernel']} | {row['settings']} | {_number(row['ms'])} | {row['note']} |"
                for row in self.tuning
            ]
        if bench.absent:
            lines += ["", "## not measured", ""]
            lines += [f"* {name}: {reason}" for name, reason in bench.absent.items()]
        return "\n".join(lines).rstrip() + "\n"


def _one_line(check: Any) -> str:
    if isinstance(check, dict):
        return ", ".join(f"{key} {value}" for key, value in check.items() if value not in ([], ""))
    return str(check)


def _number(value: float | None, pattern: str = ".3g") -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if pattern == ".3g" and value >= 100 else format(value, pattern)


def _table(figures: list[Figure]) -> list[str]:
    unit = next((figure.unit for figure in figures if figure.unit), "units")
    lines = [
        f"| subject | task, note | ms | in units of: {unit} | % of ceiling | extra MiB | of bf16 "
        "logits | gate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        times = _number(figure.ms, ".4g")
        if figure.ms_quartiles:
            times += " ({:.4g} to {:.4g})".format(*figure.ms_quartiles)
        extra = None if figure.extra_bytes is None else figure.extra_bytes / 2**20
        share = f"1/{1 / figure.share_of_logits:.1f}" if (figure.share_of_logits or 0) > 0 else ""
        cells = (
            figure.subject,
            figure.note,
            times,
            _number(figure.units, ".3f"),
            _number(figure.percent_of_ceiling, ".1f"),
            _number(extra),
            share,
            figure.gate,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def short_table(bench: Bench) -> str:
    """What is printed last."""
    lines = []
    for figure in bench.figures:
        parts = [f"{figure.section:9s} {figure.subject:36s} {figure.note:24.24s}"]
        if figure.ms is not None:
            parts.append(f"{figure.ms:9.3f} ms")
        if figure.units is not None:
            parts.append(f"{figure.units:7.3f} units")
        if figure.percent_of_ceiling is not None:
            parts.append(f"{figure.percent_of_ceiling:5.1f}%")
        if figure.gate.startswith("FAILED"):
            parts.append("FAILED")
        lines.append(" ".join(parts))
    return "\n".join(lines)
