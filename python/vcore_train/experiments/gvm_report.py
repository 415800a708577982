"""What the runs of the study gvm come to: tables and the plot."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullFormatter

from vcore_train.experiments.gvm_arms import BASE, REUSE, arm_named, base_of
from vcore_train.experiments.gvm_start import (
    AS_IN_A_RUN,
    BEST,
    FEW_PROMPTS,
    FIGURES,
    POOL,
    QUANTILES,
    STAGE1,
)
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.statistics import Interval, interval
from vcore_train.plots import running_mean

ACCURACY_RANGE = (0.2, 0.8)  # of the start, at temperature 1
COSTS = ("rollouts", "steps")
SMOOTH = 1  # iterations on either side in the running mean that speed is read from


def _runs(result: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """One a seed."""
    return [run for run in result["runs"] if run["arm"] == arm]


def _base(result: dict[str, Any], arm: str) -> list[dict[str, Any]]:
    """The runs with uniform samples and the same objective."""
    return _runs(result, base_of(arm_named(arm)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def over_run(run: dict[str, Any]) -> float:
    """Mean accuracy over the iterations."""
    return _mean(run["accuracy"][1:])


def gaps(result: dict[str, Any], arm: str, *, at_end: bool) -> list[float]:
    """Accuracy less that of uniform samples, at the end or on average over the run, by seed."""
    value = (lambda run: run["accuracy"][-1]) if at_end else over_run
    pairs = zip(_runs(result, arm), _base(result, arm), strict=True)
    return [value(run) - value(base) for run, base in pairs]


def speeds(result: dict[str, Any], arm: str, cost: str = "rollouts") -> list[float]:
    """How many times the cost uniform samples need for the accuracy that they end at, by seed.

    Above 1 the arm is faster. 0 where it does not get there, NaN where uniform samples end no
    better than they began.
    """
    return [
        speed(run, base, cost)
        for run, base in zip(_runs(result, arm), _base(result, arm), strict=True)
    ]


def speed(run: dict[str, Any], base: dict[str, Any], cost: str) -> float:
    curves = [smooth(r) for r in (run, base)]
    level = curves[1][-1]
    if level <= curves[1][0]:
        return math.nan
    own, uniform = (
        reached(curve, r[cost], level) for curve, r in zip(curves, (run, base), strict=True)
    )
    return uniform / own


def smooth(run: dict[str, Any]) -> list[float]:
    """Running means of the accuracy after each iteration; the start, the same for all, as it is."""
    return [run["accuracy"][0], *running_mean(run["accuracy"][1:], SMOOTH)]


def reached(curve: Sequence[float], cost: Sequence[float], level: float) -> float:
    """The cost at which a curve that begins below a level first reaches it, or infinity.

    It is straight between its points.
    """
    for (low, high), (before, after) in zip(pairwise(curve), pairwise(cost), strict=True):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return math.inf


# ---- tables ----


def tables(result: dict[str, Any]) -> list[Table]:
    return [_starts_table(result), _runs_table(result), _variance_table(result)]


def _starts_table(result: dict[str, Any]) -> Table:
    low, high = ACCURACY_RANGE
    rows = []
    for start in result["starts"]:
        seed = start["seed"]
        inside = low <= start["accuracy"] <= high
        held_out = next(run["accuracy"][0] for run in result["runs"] if run["seed"] == seed)
        rows.append(
            [
                str(seed),
                str(start["steps"]),
                f"{100 * start['accuracy']:.0f}{'' if inside else ' (!)'}",
                f"{100 * held_out:.0f}",
                *(f"{q:.2f}" for q in start["quantiles"].values()),
                *(f"{100 * start[name]:.0f}" for name in ("never", "always")),
            ]
        )
    return Table(
        "Starts",
        (
            *("seed", "SFT steps", "sampled, %", "greedy, held out, %"),
            *(f"{100 * q:.0f}%" for q in QUANTILES),
            *("rate 0, %", "rate 1, %"),
        ),
        rows,
        note="Quantiles of the acceptance rates of prompts, and shares of prompts, at temperature "
        f"1. (!): outside {100 * low:.0f} to {100 * high:.0f}%, where the comparison means little.",
    )


def _runs_table(result: dict[str, Any]) -> Table:
    rows = []
    for arm in _arms(result):
        runs = _runs(result, arm)
        base = arm == base_of(arm_named(arm))
        faster = ["" if base else _speed_text(speeds(result, arm, c)) for c in COSTS]
        rows.append(
            [
                arm,
                f"{_mean([run['rollouts'][-1] for run in runs]):.0f}",
                f"{runs[0]['steps'][-1]}",
                f"{_mean([_mean(run['unsampled']) for run in runs]):.1f}",
                _percent(interval([run["accuracy"][-1] for run in runs])),
                "" if base else _percent(interval(gaps(result, arm, at_end=True)), signed=True),
                _percent(interval([over_run(run) for run in runs])),
                "" if base else _percent(interval(gaps(result, arm, at_end=False)), signed=True),
                *faster,
            ]
        )
    return Table(
        "Runs: held-out accuracy, greedy",
        (
            *("arm", "rollouts", "steps", "prompts left out", "at the end, %", "minus uniform"),
            *("over the run, %", "minus uniform", "speed by rollouts", "speed by steps"),
        ),
        rows,
        note="Minus uniform: of the same objective, paired by seed. Prompts left out: without "
        "samples in the second stage, mean of an iteration. Speed: what uniform samples need for "
        "the accuracy that they end at, over what the arm needs for it, on running means of "
        f"{2 * SMOOTH + 1} evaluations; above 1 is faster; seeds that do not get there are left "
        "out and counted. 4 x the steps is not equal in steps: it shows what they do by "
        "themselves. Few prompts: a quarter of them with four times the samples, the first stage "
        "twice as long.",
    )


def _arms(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in result["runs"]))


def _percent(value: Interval, *, signed: bool = False) -> str:
    scaled = Interval(100 * value.mean, 100 * value.low, 100 * value.high, value.n)
    return ("+" if signed and scaled.mean > 0 else "") + scaled.text(1)


def _speed_text(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    there = [value for value in known if value > 0]
    if not known:
        return "no level"
    if not there:
        return "not reached"
    some = "" if len(there) == len(values) else f" ({len(there)} of {len(values)})"
    return interval(there).text(2) + some


def _variance_table(result: dict[str, Any]) -> Table:
    rows = [
        [rule, knows, *(_figure_text(_variance(result, rule, knows, name)) for name in FIGURES)]
        for rule, knows in _allocations(result)
    ]
    return Table(
        "Squared error of the gradient estimate at the start, relative to uniform samples",
        ("allocation", "p and G from", *FIGURES),
        rows,
        text=2,
        note="Measured: mean squared distance of estimates drawn from a second pool, weighted by "
        "the known p; the next column divides by the accepted of the draw instead. Formula: sum "
        "(G^2/p - |mu|^2)/n of the first pool. Bound: sum G^2/(p n). Each prompt has a sample or "
        "more, so that these are variances; but as in a run prompts may be left out, which is then "
        "part of the error, and the first stage has taken its share of the budget. Prompts that "
        "are never or always accepted do not take part.",
    )


def _figure_text(value: Interval) -> str:
    return value.text(2) if math.isfinite(value.mean) else ""


def _variance(result: dict[str, Any], rule: str, knows: str, name: str) -> Interval:
    return interval(
        [
            record[name]
            for seed in result["variance"]
            for record in seed["allocations"]
            if (record["rule"], record["knows"]) == (rule, knows)
        ]
    )


def _allocations(result: dict[str, Any]) -> list[tuple[str, str]]:
    return list(
        dict.fromkeys(
            (record["rule"], record["knows"])
            for seed in result["variance"]
            for record in seed["allocations"]
        )
    )


# ---- the plot ----

COLOURS = {  # one a rule
    "uniform": "#333333",
    "gvm": "#c8452f",
    "gvm, reused": "#e8917f",
    "gvm, alpha 0": "#e8917f",
    "neyman": "#3b6fb6",
    "knapsack": "#2a9d6f",
    "reinforce_ada": "#c98a1b",
    "uniform, 4 x the steps": "#8d5fb0",
    BEST: "#8a8f98",
}
LABELS = {
    "uniform": "uniform",
    "gvm": "GVM",
    "gvm, reused": "GVM, stage 1 reused",
    "neyman": "Neyman",
    "knapsack": "Knapsack",
    "reinforce_ada": "Reinforce-Ada",
    "uniform, 4 x the steps": "uniform, 4 x the steps",
}


def _kind(arm: str) -> str:
    """What colours an arm: its rule, and what is special about it."""
    found = arm_named(arm)
    if found.steps > 1:
        return f"uniform, {found.steps} x the steps"
    return "gvm, reused" if found.options == REUSE else found.allocation


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, 2, 4, size=(18, 9)) as (drawn_on, axes):
        for row, base in enumerate(BASE.values()):
            arms = [a for a in _arms(result) if base_of(arm_named(a)) == base]
            _plot_accuracy(axes[row, 0], result, arms, "rollouts")
            _plot_accuracy(axes[row, 1], result, arms, "steps")
            axes[row, 0].set_title(f"{base}: accuracy against rollouts")
            axes[row, 1].set_title(f"{base}: accuracy against optimizer steps")
            axes[row, 1].sharey(axes[row, 0])
        _plot_further(axes[0, 2], result)
        _plot_gaps(axes[0, 3], result)
        _plot_variance(axes[1, 2], result)
        _plot_acceptance(axes[1, 3], result)
        handles = {
            LABELS[kind]: axes[0, 0].plot([], [], color=COLOURS[kind], marker="o", ms=4)[0]
            for kind in LABELS
        }
        drawn_on.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7)


def _plot_accuracy(axes: Any, result: dict[str, Any], arms: Sequence[str], cost: str) -> None:
    """Mean over seeds, smoothed as speed is."""
    for arm in arms:
        runs = _runs(result, arm)
        curves = [smooth(run) for run in runs]
        means = [_mean(values) for values in zip(*curves, strict=True)]
        costs = [_mean(values) for values in zip(*(run[cost] for run in runs), strict=True)]
        style = "--" if _kind(arm) == "uniform" else "-"
        axes.plot(costs, means, style, color=COLOURS[_kind(arm)], marker="o", ms=2.5, lw=1.4)
    axes.set(xlabel="rollouts" if cost == "rollouts" else "optimizer steps")
    axes.set_ylabel("held-out accuracy, greedy")


def _plot_further(axes: Any, result: dict[str, Any]) -> None:
    """Mean further samples against the acceptance rate of the first ones, RAFT++ arms."""
    for arm in _arms(result):
        runs = _runs(result, arm)
        pooled: dict[int, list[float]] = {}
        for run in runs:
            for accepted, (mean, count) in run["further"].items():
                total, number = pooled.get(int(accepted), (0.0, 0))
                pooled[int(accepted)] = [total + mean * count, number + count]
        if base_of(arm_named(arm)) == BASE["raft++"] and pooled:
            first = max(pooled)
            points = sorted((a / first, total / n) for a, (total, n) in pooled.items())
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=COLOURS[_kind(arm)], marker="o", ms=5)
    axes.set(xlabel="accepted share of a prompt's first samples", ylabel="further samples, mean")
    axes.set_title("Who gets the samples (RAFT++)")


def _plot_gaps(axes: Any, result: dict[str, Any]) -> None:
    arms = [arm for arm in _arms(result) if arm != base_of(arm_named(arm))][::-1]
    for place, arm in enumerate(arms):
        found = gaps(result, arm, at_end=False)
        value, colour = interval(found), COLOURS[_kind(arm)]
        axes.plot([100 * gap for gap in found], [place] * len(found), "|", color=colour, ms=9)
        half = None if math.isnan(value.half) else 100 * value.half
        axes.errorbar(100 * value.mean, place, xerr=half, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="#333333", lw=1)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set(xlabel="points, mean of the run, minus uniform", title="Accuracy over the run")


MARKERS = {POOL: "o", STAGE1: "s", AS_IN_A_RUN: "^", FEW_PROMPTS: "D"}


def _plot_variance(axes: Any, result: dict[str, Any]) -> None:
    ends = [1.0]
    for rule, knows in _allocations(result):
        formula, measured = (
            _variance(result, rule, knows, name) for name in ("formula", "measured")
        )
        half = None if math.isnan(measured.half) else min(measured.half, 0.99 * measured.mean)
        axes.errorbar(
            formula.mean,
            measured.mean,
            yerr=half,
            fmt=MARKERS[knows],
            color=COLOURS[rule],
            ms=7,
            mfc="white" if rule.startswith("gvm,") else None,
            capsize=2,
        )
        ends += [formula.mean, measured.mean]
    low, high = 0.8 * min(ends), 1.25 * max(ends)
    axes.plot([low, high], [low, high], color="#8a8f98", lw=1, zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for knows, marker in MARKERS.items():
        axes.plot([], [], marker, color="#8a8f98", label=f"p, G from {knows}")
    axes.legend(fontsize=8, loc="upper left")
    axes.set_title("Squared error of the gradient (open: alpha 0)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator((0.1, 0.2, 0.5, 1, 2, 5, 10)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="formula, relative to uniform", ylabel="measured, relative to uniform")


def _plot_acceptance(axes: Any, result: dict[str, Any]) -> None:
    rates = [start["rates"] for start in result["starts"]]
    edges = [i / 10 for i in range(11)]
    labels = [f"seed {start['seed']}" for start in result["starts"]]
    shares = [[1 / len(own)] * len(own) for own in rates]
    greys = [str(0.25 + 0.6 * place / len(rates)) for place in range(len(rates))]
    axes.hist(rates, bins=edges, weights=shares, label=labels, color=greys)
    axes.set(xlabel="acceptance rate at the start", ylabel="share of prompts")
    axes.set_title("How hard the prompts are")
    axes.legend(fontsize=8)
