"""The roofline of a record: what each subject reaches of what the machine can do."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vcore_train.bench_record import Record, Row

OURS, ROOF = "#c8452f", "#30343b"
PEERS = ("#3b6fb6", "#c98a1b", "#5a9a68", "#7d5ba6", "#8a8f98", "#4aa3a2", "#a05a2c")
MARKERS = "sD^vPX<>"


def points(record: Record) -> list[Row]:
    """Rows that have a place in the picture: a time, and a ceiling that was measured."""
    return [
        row
        for row in record.rows
        if row.status == "measured" and row.kind != "yardstick" and record.percent(row) is not None
    ]


def plot(record: Record, path: Path) -> bool:
    """Writes the picture; False where the record has no point or no ceiling.

    On the left the roofline: arithmetic of the task over its time, against arithmetic over the
    bytes that must move (inputs and results once). On the right every problem's share of its
    ceiling, those that a copy bounds too.
    """
    rows = points(record)
    copy = record.ceilings.get("copy")
    products = {k: v for k, v in record.ceilings.items() if k != "copy"}
    if not rows or not copy or not products:
        return False
    names = list(dict.fromkeys(r.subject for r in rows if r.kind == "peer"))
    looks: dict[str, dict[str, Any]] = {
        name: {"color": PEERS[i % len(PEERS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(names)
    }
    groups = list(dict.fromkeys(row.group for row in rows))
    height = max(4.8, 0.30 * len(groups) + 1.6 + 0.17 * len(names))
    drawn, (roof, shares) = plt.subplots(
        1, 2, figsize=(15, height), layout="constrained", dpi=120, width_ratios=(1, 0.75)
    )
    try:
        _roofline(roof, rows, groups, looks, products, copy)
        for row in rows:
            share = record.percent(row) or 0.0
            shares.plot(share, groups.index(row.group), **_look(row, looks))
        shares.axvline(100, color=ROOF, linewidth=1.3)
        shares.set_yticks(
            range(len(groups)), [f"{g}  ({i})" for i, g in enumerate(groups, 1)], fontsize=8
        )
        shares.set(
            xlim=(0, None),
            ylim=(len(groups) - 0.4, -0.6),
            xlabel="% of the ceiling: PyTorch's fastest product, or its copy",
            title="what each problem reaches",
        )
        shares.grid(alpha=0.25)
        handles: dict[str, Any] = {}
        for row in rows:
            label = "here" if row.kind == "ours" else row.subject
            if label not in handles:
                handles[label] = plt.Line2D([], [], **_look(row, looks))
        ordered = sorted(handles, key=lambda label: label != "here")
        drawn.legend(
            [handles[label] for label in ordered],
            ordered,
            loc="outside lower center",
            ncols=5,
            fontsize=8,
        )
        drawn.savefig(path)
    finally:
        plt.close(drawn)
    return True


def _look(row: Row, looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if row.kind == "ours":
        look: dict[str, Any] = {"color": OURS, "marker": "o", "markersize": 8, "zorder": 4}
    else:
        look = {**looks[row.subject], "markersize": 6, "zorder": 3}
    return {"linestyle": "", "alpha": 0.85, **look}


def _roofline(
    axes: plt.Axes,
    rows: list[Row],
    groups: list[str],
    looks: dict[str, dict[str, Any]],
    products: dict[str, float],
    copy: float,
) -> None:
    placed = [
        (row, row.flops / row.bytes, row.flops / row.seconds_median / 1e9)
        for row in rows
        if row.flops and row.bytes
    ]
    ridges = [rate / copy for rate in products.values()]
    low = 10 ** math.floor(math.log10(min([0.5, *(x for _, x, _ in placed)])))
    high = 10 ** math.ceil(math.log10(max([x for _, x, _ in placed] + ridges) * 1.5))
    for name, rate in products.items():
        axes.plot([low, rate / copy, high], [low * copy, rate, rate], color=ROOF, linewidth=1.3)
        text = f"{name}: {rate:.0f} GFLOP/s"
        axes.annotate(
            text, (high, rate), (-4, 4), textcoords="offset points", ha="right", fontsize=8
        )
    axes.annotate(
        f"copy: {copy:.0f} GB/s",
        (low, low * copy),
        (24, 8),
        textcoords="offset points",
        fontsize=8,
    )
    tops: list[tuple[float, float, set[int]]] = []  # of problems that stand at one place
    for row, x, y in placed:
        axes.plot(x, y, **_look(row, looks))
        number = groups.index(row.group) + 1
        for i, (other, top, numbers) in enumerate(tops):
            if abs(math.log10(x / other)) < 0.05:
                tops[i] = (other, max(top, y), numbers | {number})
                break
        else:
            tops.append((x, y, {number}))
    for x, y, numbers in tops:
        axes.annotate(
            ", ".join(map(str, sorted(numbers))),
            (x, y),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="#555555",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="floating-point operations a byte that must move",
        ylabel="GFLOP/s",
        title="roofline (numbers: the problems on the right)",
    )
    axes.grid(alpha=0.25)
