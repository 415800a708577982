"""Figures as PNG files; nothing here opens a window."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter

Series = tuple[Sequence[float], Sequence[float]]  # steps, values

COLOURS = {
    "start": "#8a8f98",
    "sft": "#3b6fb6",
    "random": "#8a8f98",
    "dft": "#2a9d6f",
    "iw_sft": "#c98a1b",
    "vcore": "#c8452f",
}
DASHES = {"iw_sft": "--"}  # it often lies on the curve of SFT
LABELS = {
    "start": "start",
    "sft": "SFT",
    "random": "Random",
    "dft": "DFT",
    "iw_sft": "iw-SFT",
    "vcore": "VCORE",
}
STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
}


def plot_losses(path: Path, curves: Mapping[str, Series], *, title: str, ylabel: str) -> None:
    """One curve a method: every value faint, their running mean on top."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        for method, (steps, values) in curves.items():
            colour = COLOURS.get(method, "#333333")
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=1)
            smooth = running_mean(values, max(1, len(values) // 20))
            axes.plot(
                steps,
                smooth,
                color=colour,
                linewidth=1.8,
                linestyle=DASHES.get(method, "-"),
                label=LABELS.get(method, method),
            )
        axes.set(title=title, xlabel="optimizer step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if len(curves) > 1:
            axes.legend()
        figure.savefig(path)
        plt.close(figure)


def plot_panels(path: Path, panels: Mapping[str, Series], *, title: str) -> None:
    """One small panel a figure, steps shared."""
    with plt.rc_context(STYLE):
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure, grid = plt.subplots(
            lines, columns, figsize=(4.2 * columns, 2.5 * lines), sharex=True, squeeze=False
        )
        for axes, (name, (steps, values)) in zip(grid.flat, panels.items(), strict=False):
            axes.plot(steps, values, color=COLOURS["vcore"], linewidth=1.4)
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step")
        figure.suptitle(title)
        figure.savefig(path)
        plt.close(figure)


def plot_accuracy(
    path: Path,
    groups: Sequence[str],
    accuracy: Mapping[str, Sequence[float]],
    error: Mapping[str, Sequence[float]],
    *,
    title: str,
) -> None:
    """Grouped bars: a group for each difficulty, a bar with its standard error for each method."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 4.2))
        width = 0.84 / len(accuracy)
        for place, (method, values) in enumerate(accuracy.items()):
            centres = [
                group + (place - (len(accuracy) - 1) / 2) * width for group in range(len(groups))
            ]
            axes.bar(
                centres,
                values,
                width * 0.92,
                yerr=error[method],
                error_kw={"elinewidth": 1, "ecolor": "#444444"},
                color=COLOURS.get(method, "#333333"),
                label=LABELS.get(method, method),
            )
        axes.set_xticks(range(len(groups)), groups)
        axes.set(title=title, ylabel="exact-match accuracy (lines: standard error)")
        axes.set_ylim(0, None if any(map(any, accuracy.values())) else 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside lower center", ncols=len(accuracy))
        figure.savefig(path)
        plt.close(figure)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over up to ``width`` values on either side of each."""
    means = []
    for place in range(len(values)):
        near = values[max(0, place - width) : place + width + 1]
        means.append(sum(near) / len(near))
    return means
