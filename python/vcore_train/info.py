"""``vcore info``: what is usable here, in which version, and why something is off."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from vcore_kernels.backends import backends

PACKAGES = (  # distribution, what it is for
    ("torch", "everything"),
    ("transformers", "models, trainer"),
    ("accelerate", "trainer"),
    ("peft", "LoRA"),
    ("datasets", "datasets by name"),
    ("safetensors", "checkpoints"),
    ("triton", "GPU kernels"),
    ("flash-attn", "fused attention in the main forward"),
)
# What the CPU kernels ask for, in the spelling of /proc/cpuinfo.
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def print_info(console: Console) -> None:
    """Prints one section each for backends, packages and hardware."""
    for title, table in (
        ("Backends of vcore_kernels", _backends()),
        ("Packages", _packages()),
        ("Hardware", _hardware()),
    ):
        console.print(f"[bold]{title}[/]")
        console.print(table)


def cpu_features(cpuinfo: str) -> dict[str, bool]:
    """Which instruction sets of ``FEATURES`` appear in the text of /proc/cpuinfo."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split()
    return {name: name in flags for name in FEATURES}


def _table() -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(min_width=14)
    table.add_column()
    table.add_column(style="dim", overflow="fold")
    return table


def _mark(usable: bool) -> str:
    return "[green]on[/]" if usable else "[yellow]off[/]"


def _backends() -> Table:
    table = _table()
    for name, support in backends().items():
        table.add_row(name, _mark(support.usable), support.reason)
    return table


def _packages() -> Table:
    table = _table()
    table.add_row("python", platform.python_version(), "")
    for name in ("vcore_kernels", *(package for package, _ in PACKAGES)):
        purpose = dict(PACKAGES).get(name, "")
        try:
            table.add_row(name, importlib.metadata.version(name), purpose)
        except importlib.metadata.PackageNotFoundError:
            table.add_row(
                name, _mark(False), f"not installed: {purpose or 'run from a source tree'}"
            )
    return table


def _hardware() -> Table:
    table = _table()
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    model = next(
        (x.split(":", 1)[1].strip() for x in text.splitlines() if x.startswith("model name")), ""
    )
    table.add_row("cpu", f"{platform.machine()} {model}".strip(), "")
    table.add_row("torch uses", torch.backends.cpu.get_cpu_capability(), "instruction set of ATen")
    if text:
        has = cpu_features(text)
        table.add_row(
            "instructions", " ".join(name for name in FEATURES if has[name]) or "baseline", ""
        )
        missing = " ".join(name for name in FEATURES if not has[name])
        if missing:
            table.add_row("", "", f"this processor lacks: {missing}")
    table.add_row(
        "threads",
        f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "OMP_NUM_THREADS sets it",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            table.add_row(
                f"gpu {index}",
                found.name,
                f"{found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}",
            )
    else:
        table.add_row("gpu", _mark(False), _why_no_gpu())
    return table


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU"
    return f"torch {torch.__version__} finds no device: no driver, or none visible"
