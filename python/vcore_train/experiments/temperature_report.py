"""What the study of temperatures found: records, tables, sentences and the plot."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.run import UNIFORM
from vcore_train.experiments.statistics import Interval, interval

PAPER = (1e2, 1e6)  # the temperatures of the paper's sweep
AT_KL = (0.02, 0.1, 0.5)  # nats at which curves are compared
EXACT = "derivative"

# ---- what came out ----


def _runs(result: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in result["runs"] if all(r[name] == value for name, value in wanted.items())]


def _choices(result: dict[str, Any], name: str) -> list[Any]:
    """The different values of a run's option, in their order, None left out."""
    return list(dict.fromkeys(r[name] for r in result["runs"] if r[name] is not None))


def gap(result: dict[str, Any], runs: Sequence[dict[str, Any]], place: int = -1) -> Interval:
    """Held-out loss less that of uniform weights, by seed; runs of a seed are averaged."""
    base = {r["seed"]: r["loss"][place] for r in _runs(result, arm=UNIFORM.name)}
    return interval(
        [
            fmean(r["loss"][place] for r in runs if r["seed"] == seed) - loss
            for seed, loss in base.items()
        ]
    )


def boundary(result: dict[str, Any], epsilon: float) -> tuple[float | None, float | None]:
    """(the lowest stable temperature, the next, at which a seed is unstable); None: there is none.

    A temperature counts as stable if it and all higher ones are in every seed.
    """
    stable = None
    for temperature in sorted(_choices(result, "temperature"), reverse=True):
        runs = _runs(result, temperature=temperature, epsilon=epsilon)
        if any(run["unstable"] for run in runs):
            return stable, temperature
        stable = temperature
    return stable, None


def drift(result: dict[str, Any], temperature: float) -> dict[str, Any]:
    """KL that one temperature gives with exact utilities, over seeds, steps and models.

    ``start`` and ``end``: of the uniform runs, a value a seed; ``other``: of the other model;
    ``factor``: the largest of all of them, and of the steps between, over the smallest.
    """
    own = result["weighed"][0]["hidden"]
    exact = [r for r in result["weighed"] if r["estimate"] == EXACT]
    last = max(r["step"] for r in exact)

    def kl(**wanted: Any) -> list[float]:
        return [
            r["kl"][r["temperatures"].index(temperature)]
            for r in exact
            if all(r[name] == value for name, value in wanted.items())
        ]

    everywhere = kl()
    seeds = [max(values) / min(values) for values in (kl(hidden=own, step=0),)]
    runs = [
        max(values) / min(values)
        for values in (
            kl(hidden=own, seed=seed) for seed in dict.fromkeys(r["seed"] for r in exact)
        )
    ]
    return {
        "start": kl(hidden=own, step=0),
        "end": kl(hidden=own, step=last),
        "other": [k for r in exact if r["hidden"] != own for k in kl(**_one(r))],
        "seeds": seeds[0],
        "run": fmean(runs),
        "factor": max(everywhere) / min(everywhere),
    }


def _one(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("seed", "hidden", "step")}


def ratio_at_kl(record: dict[str, Any], kl: float) -> float:
    """V_q/V_u where a record's curve passes ``kl`` nats, straight between points in logarithms.

    NaN where it does not get there.
    """
    points = sorted(zip(record["kl"], record["ratio"], strict=True))
    for (k0, r0), (k1, r1) in pairwise(points):
        if k0 <= kl <= k1 and k0 > 0:
            part = 0.0 if k0 == k1 else math.log(kl / k0) / math.log(k1 / k0)
            return math.exp((1 - part) * math.log(r0) + part * math.log(r1))
    return math.nan


def collapse(result: dict[str, Any], kl: float) -> tuple[float, float, float, float]:
    """(lowest, highest V_q/V_u at ``kl`` nats, and at the temperature that comes nearest to it).

    Over all seeds, steps and models, with exact utilities. The temperature is the one whose mean KL
    is nearest in logarithms.
    """
    exact = [r for r in result["weighed"] if r["estimate"] == EXACT]
    at_kl = [r for r in (ratio_at_kl(record, kl) for record in exact) if not math.isnan(r)]
    if not at_kl:
        return (math.nan,) * 4
    places = range(len(exact[0]["temperatures"]))
    place = min(
        places,
        key=lambda p: abs(math.log(max(fmean(r["kl"][p] for r in exact), 1e-30) / kl)),
    )
    at_temperature = [r["ratio"][place] for r in exact]
    return min(at_kl), max(at_kl), min(at_temperature), max(at_temperature)


def by_estimate(result: dict[str, Any], estimate: str, precision: str) -> dict[str, Interval]:
    """Over the seeds of the model that trained, mean of the steps: correlation with the derivative,
    spread in its units, and KL at the largest and the smallest temperature of the paper's.
    """
    own = result["weighed"][0]["hidden"]
    records = [r for r in result["weighed"] if r["hidden"] == own]
    found: dict[str, list[float]] = {"pearson": [], "spread": [], "kl": []}
    for seed in dict.fromkeys(r["seed"] for r in records):
        mine = [r for r in records if r["seed"] == seed]
        those = [r for r in mine if (r["estimate"], r["precision"]) == (estimate, precision)]
        exact = [r for r in mine if r["estimate"] == EXACT]
        found["pearson"].append(fmean(r["pearson"] for r in those))
        found["spread"].append(
            fmean(r["spread"] for r in those) / fmean(e["spread"] for e in exact)
        )
        found["kl"].append(fmean(r["kl"][r["temperatures"].index(PAPER[0])] for r in those))
    return {name: interval(values) for name, values in found.items()}


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a run; figures of its steps are means over the run."""
    rows = []
    for run in result["runs"]:
        row = {name: value for name, value in run.items() if not isinstance(value, list)}
        for name in ("kl", "alpha", "ratio", "tau"):
            row[name] = fmean(run[name]) if run[name] else math.nan
        rows.append({**row, "loss_first": run["loss"][0], "loss_last": run["loss"][-1]})
    return rows


# ---- tables ----


def _mean(runs: Sequence[dict[str, Any]], name: str) -> Interval:
    """Over seeds; runs of a seed, and what a run has several of, are averaged."""
    seeds = dict.fromkeys(r["seed"] for r in runs)
    return interval([fmean(_flat(r[name] for r in runs if r["seed"] == seed)) for seed in seeds])


def _flat(values: Any) -> list[float]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def _signed(value: Interval, digits: int = 3) -> str:
    return ("+" if value.mean > 0 else "") + value.text(digits)


def _few(value: float) -> str:
    """Two digits, without an exponent where the number is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _unstable(runs: Sequence[dict[str, Any]]) -> str:
    return f"{sum(r['unstable'] for r in runs)} of {len(runs)}"


def tables(result: dict[str, Any]) -> list[Table]:
    temperatures, epsilons = _choices(result, "temperature"), _choices(result, "epsilon")
    figures = ("KL", "alpha", "V_q/V_u", "gradient norm", "spikes", "clipped", "unstable")

    def cells(runs: Sequence[dict[str, Any]]) -> list[str]:
        return [
            _few(_mean(runs, "kl").mean),
            _mean(runs, "alpha").text(2),
            _few(_mean(runs, "ratio").mean),
            _mean(runs, "norm").text(2),
            _mean(runs, "spikes").text(1),
            _mean(runs, "clipped").text(2),
            _unstable(runs),
        ]

    sweep = [
        [
            f"{temperature:g}",
            f"{1 / temperature:.2g}",
            *(
                _signed(gap(result, _runs(result, temperature=temperature, epsilon=epsilon)))
                for epsilon in epsilons
            ),
            *cells(_runs(result, temperature=temperature)),
        ]
        for temperature in temperatures
    ]
    budgets = [
        [f"{budget:g}", _signed(gap(result, runs)), *cells(runs)]
        for budget in _choices(result, "kl_budget")
        for runs in [_runs(result, kl_budget=budget)]
    ]
    uniform = _runs(result, arm=UNIFORM.name)
    first, last = (interval([r["loss"][place] for r in uniform]).text(3) for place in (0, -1))
    edges = []
    for epsilon in epsilons:
        for name, temperature in zip(
            ("lowest stable", "highest unstable"), boundary(result, epsilon), strict=True
        ):
            runs = _runs(result, temperature=temperature, epsilon=epsilon)
            edges.append(
                [
                    f"{epsilon:g}",
                    name,
                    *(_edge(result, runs, temperature) if temperature else ["none"] + 4 * [""]),
                ]
            )
    moved = [t for t in temperatures if fmean(drift(result, t)["start"]) > 1e-3]
    drifts = []
    for temperature in moved:
        d = drift(result, temperature)
        drifts.append(
            [
                f"T {temperature:g}",
                *(_range(d[name]) for name in ("start", "end", "other")),
                *(_few(d[name]) for name in ("seeds", "run", "factor")),
            ]
        )
    for budget in _choices(result, "kl_budget"):
        runs = _runs(result, kl_budget=budget)
        values = _flat(r["kl"] for r in runs)
        drifts.append(
            [
                f"budget {budget:g}",
                _range([r["kl"][0] for r in runs]),
                _range([r["kl"][-1] for r in runs]),
                "",
                f"{max(r['kl'][0] for r in runs) / min(r['kl'][0] for r in runs):.1f}",
                f"{fmean(max(r['kl']) / min(r['kl']) for r in runs):.1f}",
                f"{max(values) / min(values):.1f}",
            ]
        )
    ratios = [
        [f"{kl:g}", *(_few(value) for value in found), *_factors(found)]
        for kl in AT_KL
        for found in [collapse(result, kl)]
        if not math.isnan(found[0])
    ]
    estimates = [
        [
            estimate,
            precision,
            found["pearson"].text(4),
            found["spread"].text(2),
            _few(found["kl"].mean),
        ]
        for precision in ("fp32", "bf16")
        for estimate in (EXACT, *(f"eps {epsilon:g}" for epsilon in epsilons))
        if (estimate, precision) != (EXACT, "bf16")
        for found in [by_estimate(result, estimate, precision)]
    ]
    own, other = (f"{r['hidden']} wide" for r in (result["weighed"][0], result["weighed"][-1]))
    return [
        Table(
            "Temperature and epsilon: held-out loss minus uniform's",
            ("T", "tau", *(f"eps {epsilon:g}" for epsilon in epsilons), *figures),
            sweep,
            note=f"Uniform weights: {first} at the start, {last} at the end, "
            f"{_unstable(uniform)} unstable. Unstable: the run ends above its start, or its "
            "gradients cease to be finite. From KL on: means over eps and the run. Norm: the "
            "median before clipping at 1. Spikes: steps above 2 times the median norm of the 20 "
            "before. alpha: mode utility, cap 1.",
        ),
        Table(
            "KL budgets: held-out loss minus uniform's",
            ("budget, nats", "minus uniform", *figures),
            budgets,
            note="Exact utilities; the same probes, batches and variance control.",
        ),
        Table(
            "The stability boundary",
            ("eps", "temperature", "T", "tau", "tau * spread", "KL", "ends above its start by"),
            edges,
            text=2,
            note="Stable: this and every higher temperature, in all seeds. Spread: of the "
            "utilities within a trajectory, root mean square over the uniform run.",
        ),
        Table(
            "KL that a temperature gives, and that a budget gives",
            (
                *("weights", f"start, {own}", "end of the run", f"start, {other}"),
                *("over seeds, x", "over a run, x", "over all, x"),
            ),
            drifts,
            note="Lowest to highest over seeds, nats. Temperatures: exact utilities along the "
            "uniform runs. Budgets: along their own runs, first and last stretch. Factors: largest "
            "over smallest among the seeds' starts, along a run (mean of seeds), of everything.",
        ),
        Table(
            "V_q/V_u at equal KL and at equal temperature",
            (
                *("KL, nats", "lowest", "highest", "lowest at one T", "highest at one T"),
                *("factor", "factor at one T"),
            ),
            ratios,
            note="Over all seeds, judged steps and both models, exact utilities; the temperature "
            "whose mean KL comes nearest.",
        ),
        Table(
            "Estimates of the utilities",
            ("estimate", "precision", "Pearson r", "spread", f"KL at T {PAPER[0]:g}"),
            estimates,
            text=2,
            note="r with the derivative in fp32; spread as a multiple of its own. bf16: autocast.",
        ),
    ]


def _edge(result: dict[str, Any], runs: Sequence[dict[str, Any]], temperature: float) -> list[str]:
    above = interval([r["loss"][-1] - r["loss"][0] for r in runs])
    return [
        f"{temperature:g}",
        f"{1 / temperature:.2g}",
        f"{spread(result) / temperature:.2g}",
        _few(_mean(runs, "kl").mean),
        _signed(above),
    ]


def spread(result: dict[str, Any]) -> float:
    """Of the exact utilities within a trajectory, mean over the uniform runs."""
    own = result["weighed"][0]["hidden"]
    return fmean(
        r["spread"] for r in result["weighed"] if r["estimate"] == EXACT and r["hidden"] == own
    )


def _range(values: Sequence[float]) -> str:
    low, high = _few(min(values)), _few(max(values))
    return low if low == high else f"{low} to {high}"


def _factors(found: tuple[float, float, float, float]) -> list[str]:
    return [_few(found[1] / found[0]), _few(found[3] / found[2])]


# ---- sentences ----


def _clear(value: Interval) -> bool:
    return value.low > 0 or value.high < 0


def reading(result: dict[str, Any]) -> list[str]:
    """What came out, from the figures."""
    temperatures, epsilons = _choices(result, "temperature"), _choices(result, "epsilon")
    published = [t for t in temperatures if PAPER[0] <= t <= PAPER[1]]
    runs = [r for t in published for r in _runs(result, temperature=t)]
    gaps = [
        gap(result, _runs(result, temperature=t, epsilon=e)) for t in published for e in epsilons
    ]
    clear = [g for g in gaps if _clear(g)]
    most = max(max(r["kl"]) for r in runs)
    found = [
        f"In the paper's range, T {PAPER[0]:g} to {PAPER[1]:g}, weights "
        f"{'hardly move' if most < 0.01 else 'move'} at this model's scale: KL is at most "
        f"{most:.2g} nats and held-out loss less uniform's between "
        f"{min(g.mean for g in gaps):+.4f} and {max(g.mean for g in gaps):+.4f}"
        + (f", {len(clear)} of {len(gaps)} clearly apart." if clear else ", no clear difference.")
    ]
    within = [t for t in temperatures if fmean(drift(result, t)["start"]) > 1e-3]
    if within:
        lowest, highest = min(within), max(within)
        found.append(
            f"They move from T {highest:g} ({fmean(drift(result, highest)['start']):.2g} nats at "
            f"the start) to T {lowest:g} ({fmean(drift(result, lowest)['start']):.2g}), which is "
            f"tau {1 / lowest:g}: the spread of utilities within a trajectory is "
            f"{spread(result):.2g} here, and T is in its units."
        )
    edges = {epsilon: boundary(result, epsilon) for epsilon in epsilons}
    for edge in dict.fromkeys(edges.values()):
        same = ", ".join(f"{epsilon:g}" for epsilon in epsilons if edges[epsilon] == edge)
        where = f"At eps {same}" if len(set(edges.values())) > 1 else "At every eps"
        stable, lost = edge
        if lost is None:
            found.append(f"{where} all temperatures are stable.")
        elif stable is None:
            found.append(f"{where} no temperature is stable.")
        else:
            near, far = (_mean(_runs(result, temperature=t), "kl").mean for t in edge)
            found.append(
                f"{where} runs are stable down to T {stable:g} (tau times the spread "
                f"{spread(result) / stable:.2g}, KL {near:.2g} nats) and not at T {lost:g} "
                f"({spread(result) / lost:.2g}, {far:.2g} nats)."
            )
    budgets = _choices(result, "kl_budget")
    broken = [b for b in budgets if any(r["unstable"] for r in _runs(result, kl_budget=b))]
    found.append(
        f"Of the budgets {', '.join(f'{b:g}' for b in budgets)} nats "
        + (
            f"the runs of {' and '.join(f'{b:g}' for b in broken)} end above the start in a seed."
            if broken
            else "none ends above its start."
        )
    )
    best = min((gap(result, _runs(result, kl_budget=b)).mean, b) for b in budgets)
    own = gap(result, _runs(result, kl_budget=best[1]))
    hottest = min(
        (gap(result, _runs(result, temperature=t)).mean, t) for t in within or temperatures
    )
    warm = gap(result, _runs(result, temperature=hottest[1]))
    found.append(
        f"The best budget ends at {_signed(own)} against uniform weights ({best[1]:g} nats"
        f"{'' if _clear(own) else ', no clear difference'}), the best temperature that moves them "
        f"at {_signed(warm)} (T {hottest[1]:g}{'' if _clear(warm) else ', no clear difference'})."
    )
    estimates = {
        p: [by_estimate(result, f"eps {e:g}", p) for e in epsilons] for p in ("fp32", "bf16")
    }
    apart = max(
        abs(a["loss"][-1] - b["loss"][-1])
        for t in published
        for a, b in product(_runs(result, temperature=t), repeat=2)
        if a["seed"] == b["seed"]
    )
    found.append(
        f"In fp32 r with the derivative is at least "
        f"{min(e['pearson'].mean for e in estimates['fp32']):.4f} at every eps, and at the paper's "
        f"temperatures the losses of two eps are at most {apart:.2g} apart. In bf16 the spread of "
        "the utilities is "
        + ", ".join(
            f"{e['spread'].mean:.3g} (r {e['pearson'].mean:.2f}) at eps {epsilon:g}"
            for epsilon, e in zip(epsilons, estimates["bf16"], strict=True)
        )
        + " times that of the derivative, and "
        f"T {PAPER[0]:g} moves the weights by "
        + ", ".join(f"{e['kl'].mean:.2g}" for e in estimates["bf16"])
        + f" nats instead of {by_estimate(result, EXACT, 'fp32')['kl'].mean:.2g}: where an "
        "estimate is rounding, eps * T decides."
    )
    for kl in AT_KL[1:2]:
        c = collapse(result, kl)
        if not math.isnan(c[0]):
            found.append(
                f"At {kl:g} nats V_q/V_u is {_few(c[0])} to {_few(c[1])} over seeds, steps and "
                f"models (a factor of {_few(c[1] / c[0])}), at one temperature {_few(c[2])} to "
                f"{_few(c[3])} ({_few(c[3] / c[2])}); alpha is its inverse root."
            )
    moving = [t for t in within if fmean(drift(result, t)["start"]) < 1]
    if moving:
        worst = max(moving, key=lambda t: drift(result, t)["factor"])
        d = drift(result, worst)
        reached = [
            max(_flat(r["kl"] for r in _runs(result, kl_budget=b)))
            / min(_flat(r["kl"] for r in _runs(result, kl_budget=b)))
            for b in budgets
        ]
        found.append(
            f"T {worst:g} means {_range(d['start'])} nats at the starts of the seeds, "
            f"{_range(d['end'])} at the ends of their runs and {_range(d['other'])} with the other "
            f"model, a factor of {_few(d['factor'])} in all ({_few(d['run'])} along a run); what a "
            f"budget gives varies by at most {max(reached):.2f}."
        )
    return found


# ---- the plot ----

WARM = ("#2a9d6f", "#7fb069", "#c98a1b", "#e07b39", "#c8452f", "#8d2f5f")
COLD = ("#b9d3ee", "#8bb4de", "#5e95cd", "#3b6fb6", "#244a80")


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, 2, 3, size=(16, 8.6)) as (drawn_on, grid):
        for axes, panel in zip(
            grid.flat, (_map, _against_kl, _curves, _ratios, _alphas, _along), strict=True
        ):
            panel(result, axes)
        drawn_on.suptitle(headline(result), fontsize=12)


def headline(result: dict[str, Any]) -> str:
    """The plot's title: what is seen."""
    edges = {boundary(result, e) for e in _choices(result, "epsilon")}
    where = sorted({t for _, t in edges if t is not None}, reverse=True)
    moving = [
        drift(result, t)["factor"]
        for t in _choices(result, "temperature")
        if 1e-3 < fmean(drift(result, t)["start"]) < 1
    ]
    parts = [f"Unstable from T {where[0]:g} down" if where else "Every temperature is stable"]
    if moving:
        parts.append(
            f"the same temperature means up to {max(moving):.0f} times the KL elsewhere, "
            "a budget the same"
        )
    return "; ".join(parts)


def _map(result: dict[str, Any], axes: Any) -> None:
    temperatures, epsilons = _choices(result, "temperature"), _choices(result, "epsilon")
    runs = [[_runs(result, temperature=t, epsilon=e) for t in temperatures] for e in epsilons]
    values = [[gap(result, cell).mean for cell in line] for line in runs]
    top = max(max(map(max, values)), 1e-6)
    axes.imshow(values, cmap="OrRd", vmin=0, vmax=1.3 * top, aspect="auto")
    for row, column in product(range(len(epsilons)), range(len(temperatures))):
        broken = sum(r["unstable"] for r in runs[row][column])
        text = f"{values[row][column]:+.3f}" + (
            f"\nx {broken}/{len(runs[row][column])}" if broken else ""
        )
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=8,
            weight="bold" if broken else "normal",
        )
    axes.set_xticks(range(len(temperatures)), [f"{t:g}" for t in temperatures], fontsize=8)
    axes.set_yticks(range(len(epsilons)), [f"{e:g}" for e in epsilons])
    axes.set(
        title="Held-out loss minus uniform's; x seeds unstable",
        xlabel="temperature T = 1/tau",
        ylabel="eps",
    )
    axes.grid(visible=False)


def _against_kl(result: dict[str, Any], axes: Any) -> None:
    for name, what, colour, marker in (
        ("temperature", "temperature", "#c8452f", "o"),
        ("kl_budget", "KL budget", "#3b6fb6", "s"),
    ):
        points = []
        for choice in _choices(result, name):
            runs = _runs(result, **{name: choice})
            kl = _mean(runs, "kl").mean
            if kl > 1e-6:
                value = gap(result, runs)
                half = 0.0 if math.isnan(value.half) else value.half
                points.append((kl, value.mean, half, any(r["unstable"] for r in runs)))
        points.sort()
        x, y, error, broken = zip(*points, strict=True)
        axes.errorbar(x, y, error, color=colour, marker=marker, ms=4, label=what, elinewidth=1)
        marked = [(a, b) for a, b, c in zip(x, y, broken, strict=True) if c]
        if marked:
            axes.plot(*zip(*marked, strict=True), "x", color="black", ms=9, mew=1.8)
    axes.axhline(0, color="#333333", linewidth=0.8)
    axes.set(
        title="The same loss against KL (x unstable in a seed)",
        xscale="log",
        xlabel="KL reached, mean of the run (nats)",
        ylabel="held-out loss minus uniform's (nats a token)",
    )
    axes.legend(loc="upper left")


def _curves(result: dict[str, Any], axes: Any) -> None:
    epsilon = _choices(result, "epsilon")[len(_choices(result, "epsilon")) // 2]
    moved = [t for t in _choices(result, "temperature") if t <= PAPER[0]]
    chosen: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("uniform", _runs(result, arm=UNIFORM.name), {"color": "#333333", "lw": 2})
    ]
    chosen += [
        (f"T {t:g}", _runs(result, temperature=t, epsilon=epsilon), {"color": colour})
        for t, colour in zip(moved, WARM, strict=False)
    ]
    chosen += [
        (f"KL {b:g}", _runs(result, kl_budget=b), {"color": colour, "linestyle": "--"})
        for b, colour in zip(_choices(result, "kl_budget"), COLD, strict=False)
    ]
    for label, runs, look in chosen:
        means = [fmean(r["loss"][k] for r in runs) for k in range(len(runs[0]["steps"]))]
        axes.plot(runs[0]["steps"], means, label=label, **look)
    start = fmean(r["loss"][0] for r in chosen[0][1])
    axes.axhline(start, color="#8a8f98", linewidth=0.8, linestyle=":")
    axes.annotate(
        "start",
        (chosen[0][1][0]["steps"][-1], start),
        (0, 2),
        textcoords="offset points",
        color="#8a8f98",
        ha="right",
        fontsize=8,
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
    axes.set(
        title=f"Held-out loss along the run (eps {epsilon:g})",
        xlabel="optimizer step",
        ylabel="nats a token",
    )
    axes.legend(ncols=3, fontsize=8, loc="upper right")


def _exact(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in result["weighed"] if r["estimate"] == EXACT]


def _by_x(result: dict[str, Any], axes: Any, x: Callable[[dict[str, Any], int], float]) -> None:
    own = result["weighed"][0]["hidden"]
    last = max(r["step"] for r in _exact(result))
    seen = set()
    for record in _exact(result):
        label, colour = (
            (f"{record['hidden']} wide, start", "#8d5fb0")
            if record["hidden"] != own
            else (f"{own} wide, start", "#2a9d6f")
            if record["step"] == 0
            else (f"{own} wide, along the run", "#c8452f" if record["step"] == last else "#e8917f")
        )
        order = sorted(range(len(record["kl"])), key=lambda k: -record["temperatures"][k])
        points = [(x(record, k), record["ratio"][k]) for k in order if record["kl"][k] > 1e-5]
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            alpha=0.75,
            lw=1.1,
            label=None if label in seen else label,
        )
        seen.add(label)
    axes.set(xscale="log", yscale="log", ylabel="V_q/V_u")
    axes.legend(fontsize=8, loc="upper left")


def _ratios(result: dict[str, Any], axes: Any) -> None:
    _by_x(result, axes, lambda record, k: 1 / record["temperatures"][k])
    axes.set(title="V_q/V_u against tau: one curve a model and step", xlabel="tau = 1/T")


def _alphas(result: dict[str, Any], axes: Any) -> None:
    _by_x(result, axes, lambda record, k: record["kl"][k])
    axes.set(title="The same curves against KL; alpha is the inverse root", xlabel="KL (nats)")
    right = axes.secondary_yaxis(
        "right", functions=(lambda v: _power(v, -0.5), lambda a: _power(a, -2.0))
    )
    right.set_ylabel("alpha = sqrt(V_u/V_q)")


def _power(values: Any, exponent: float) -> Any:
    """Of what an axis asks for, which may hold zeros."""
    return torch.as_tensor(values, dtype=torch.float64).clamp(min=1e-12).pow(exponent).numpy()


def _along(result: dict[str, Any], axes: Any) -> None:
    own = result["weighed"][0]["hidden"]
    records = [r for r in _exact(result) if r["hidden"] == own]
    steps = sorted({r["step"] for r in records})
    moved = [t for t in _choices(result, "temperature") if t <= PAPER[0]]
    for temperature, colour in zip(moved, WARM, strict=False):
        for seed in dict.fromkeys(r["seed"] for r in records):
            values = [
                r["kl"][r["temperatures"].index(temperature)] for r in records if r["seed"] == seed
            ]
            axes.plot(steps, values, color=colour, lw=1.3)
        axes.annotate(
            f"T {temperature:g}",
            (steps[-1], values[-1]),
            (4, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=8,
        )
    for budget, colour in zip(_choices(result, "kl_budget"), COLD, strict=False):
        runs = _runs(result, kl_budget=budget)
        edges = runs[0]["steps"]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        for run in runs:
            axes.plot(middles, run["kl"], color=colour, lw=1.3, linestyle="--")
        axes.annotate(
            f"KL {budget:g}",
            (edges[0], runs[0]["kl"][0]),
            (-4, 0),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="center",
            fontsize=8,
        )
    axes.set(
        title="KL along a run: temperatures and budgets (a line a seed)",
        xlabel="optimizer step",
        ylabel="KL (nats)",
        yscale="log",
    )
    axes.margins(x=0.2)
