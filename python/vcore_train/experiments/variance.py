"""What does variance control do over a run? All modes, under SGD and AdamW.

All arms of a seed and an optimizer begin at the same weights and see the same batches and probes.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vcore_train.config import VARIANCE_CONTROLS
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.run import (
    PROBE,
    UNIFORM,
    Arm,
    Home,
    TrainSetting,
    by_window,
    each,
    judged_batches,
    make_start,
    spikes,
    start_at,
    train,
)
from vcore_train.experiments.setting import Context
from vcore_train.experiments.statistics import Interval, interval


@dataclass(frozen=True)
class VarianceSetting(TrainSetting):
    """``sgd_lr``: peak learning rate of SGD; ``run_lr`` is AdamW's."""

    vocab: int = 300
    length: int = 96
    rows: int = 6000
    steps: int = 120
    judged: int = 128
    judged_every: int = 15
    sgd_lr: float = 0.3


FULL = VarianceSetting.full()
QUICK = VarianceSetting.quick(
    layers=1, batch_size=4, train_steps=4, steps=6, judged=8, judged_every=3, seeds=1
)

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
DEFAULT_MODE = "utility"


def _arm(mode: str, budget: float, cap: float | None) -> Arm:
    suffix = "" if cap is None else f", cap {cap:g}"
    options = {"kl_budget": budget, "variance_control": mode, "variance_cap": cap}
    return Arm(f"{mode}, KL {budget:g}{suffix}", {**PROBE, **options})


BUDGET, SHARP = 0.1, 0.5
ARMS = (
    UNIFORM,
    *(_arm(mode, BUDGET, None) for mode in VARIANCE_CONTROLS),
    _arm(DEFAULT_MODE, BUDGET, 1.0),
    *(_arm(mode, SHARP, None) for mode in (DEFAULT_MODE, "none")),
)


def _without(arm: str) -> str:
    """The arm of the same budget without control."""
    budget = arm.split(", ")[1]
    return f"none, {budget}"


# ---- measuring ----


def measure(context: Context) -> dict[str, Any]:
    """``runs``: a record for each seed, optimizer and arm; ``norms``: of each step, first seed."""
    home = Home.of(context)
    each(context, "Starts", make_start, [(home, seed) for seed in context.seeds])
    jobs = [
        (home, seed, optimizer, arm)
        for seed in context.seeds
        for optimizer in OPTIMIZERS
        for arm in ARMS
    ]
    runs = each(context, "Runs", run_record, jobs)
    norms = {
        f"{run['optimizer']}, {run['arm']}": run["norms"]
        for run in runs
        if run["seed"] == context.seeds[0]
    }
    for run in runs:
        del run["norms"]
    return {"runs": runs, "norms": norms}


def run_record(home: Home, seed: int, optimizer: str, arm: Arm) -> dict[str, Any]:
    """One run: held-out loss and alpha along it, and what its gradients were like."""
    start, setting = start_at(home, seed), home.setting
    assert isinstance(setting, VarianceSetting)
    found = train(
        start,
        start.held_in,
        judged_batches(start, setting),
        arm,
        setting,
        seed=seed,
        optimizer=optimizer,
        lr=setting.sgd_lr if optimizer == "sgd" else None,
    )
    alpha = found.figures.get("alpha", [1.0] * setting.steps)
    return {
        "seed": seed,
        "optimizer": optimizer,
        "arm": arm.name,
        "steps": found.steps,
        "loss": found.loss,
        "alpha": by_window(alpha, setting.judged_every),
        "alpha_mean": fmean(alpha),
        "alpha_least": min(alpha),
        "norm": median(found.norms),
        "norm_largest": max(found.norms),
        "noise": found.noise,
        "relative_noise": found.noise / fmean(norm**2 for norm in found.norms),
        "spikes": spikes(found.norms),
        "spikes_of_run": sum(norm > 2 * median(found.norms) for norm in found.norms),
        "clipped": sum(norm > 1 for norm in found.norms) / len(found.norms),
        "norms": found.norms,
    }


# ---- what came out ----


def _runs(result: dict[str, Any], optimizer: str, arm: str) -> list[dict[str, Any]]:
    """One a seed."""
    return [r for r in result["runs"] if (r["optimizer"], r["arm"]) == (optimizer, arm)]


def _values(result: dict[str, Any], optimizer: str, arm: str, name: str) -> list[float]:
    """Of each seed; the last one of what was measured along the run."""
    values = [run[name] for run in _runs(result, optimizer, arm)]
    return [value[-1] if isinstance(value, list) else value for value in values]


def paired(
    result: dict[str, Any], optimizer: str, arm: str, base: str, name: str = "loss"
) -> Interval:
    """The arm's figure less the base's, by seed; of the loss that at the end."""
    own, other = (_values(result, optimizer, a, name) for a in (arm, base))
    return interval([x - y for x, y in zip(own, other, strict=True)])


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a run: losses at the start and the end, alpha and gradients."""
    rows = []
    for run in result["runs"]:
        row = {name: value for name, value in run.items() if not isinstance(value, list)}
        rows.append({**row, "loss_first": run["loss"][0], "loss_last": run["loss"][-1]})
    return rows


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for optimizer, title in OPTIMIZERS.items():
        rows = []
        for arm in ARMS:

            def cell(name: str, digits: int, arm: Arm = arm, optimizer: str = optimizer) -> str:
                return interval(_values(result, optimizer, arm.name, name)).text(digits)

            weighted = arm != UNIFORM
            gap = paired(result, optimizer, arm.name, UNIFORM.name)
            rows.append(
                [
                    arm.name,
                    cell("alpha_mean", 2) if weighted else "",
                    cell("norm", 2),
                    cell("noise", 2),
                    cell("relative_noise", 2),
                    cell("spikes", 1),
                    cell("spikes_of_run", 1),
                    cell("clipped", 2),
                    cell("loss", 4),
                    signed(gap) if weighted else "",
                ]
            )
        columns = (
            *("variance control", "alpha", "gradient norm", "gradient variance", "over norm²"),
            *("spikes", "of the run", "share clipped", "held-out loss", "minus uniform"),
        )
        found.append(Table(title, columns, rows, note=NOTE))
    return found


NOTE = (
    "A fresh probe each step; no cap on alpha but where one is named. Norm: the median before "
    "clipping at 1. Variance: half the mean squared difference of consecutive gradients, and that "
    "over the mean squared norm, which a constant alpha leaves alone. Spikes: steps whose norm is "
    "above 2 times the median of the 20 before, from the tenth on; of the run: above 2 times the "
    "run's median."
)


def signed(value: Interval, digits: int = 4) -> str:
    return ("+" if value.mean > 0 else "") + value.text(digits)


def clear(value: Interval) -> bool:
    """The interval is known and leaves 0 out."""
    return value.low > 0 or value.high < 0


def reading(result: dict[str, Any]) -> list[str]:
    """What control did, from the figures."""
    found = []
    default, none = (f"{mode}, KL {BUDGET:g}" for mode in (DEFAULT_MODE, "none"))
    for optimizer, title in OPTIMIZERS.items():

        def mean(name: str, arm: str, optimizer: str = optimizer) -> float:
            return interval(_values(result, optimizer, arm, name)).mean

        relative = paired(result, optimizer, default, none, "relative_noise")
        found.append(
            f'{title}, {BUDGET:g} nats: "{DEFAULT_MODE}" has a gradient variance of '
            f"{mean('noise', default):.3g} against {mean('noise', none):.3g} without control and "
            f"{mean('noise', UNIFORM.name):.3g} of uniform weights (over the squared norm "
            f"{mean('relative_noise', default):.2f} against {mean('relative_noise', none):.2f}"
            f"{'' if clear(relative) else ', no clear difference'}), and clips "
            f"{100 * mean('clipped', default):.0f}% of the steps against "
            f"{100 * mean('clipped', none):.0f}%."
        )
        fewer = paired(result, optimizer, default, none, "spikes")
        found.append(
            f"Spikes: {mean('spikes', default):.1f} a run with it, {mean('spikes', none):.1f} "
            f"without, {mean('spikes', UNIFORM.name):.1f} with uniform weights; "
            f"{_difference(fewer, 'with it less without', 1)}."
        )
        others = ", ".join(
            f'"{mode}" {mean("noise", arm):.3g} and {mean("spikes", arm):.1f}'
            for mode, arm in ((m, f"{m}, KL {BUDGET:g}") for m in VARIANCE_CONTROLS)
            if mode not in (DEFAULT_MODE, "none")
        )
        found.append(f"Variance and spikes of the other modes: {others}.")
        losses = [
            (arm.name, paired(result, optimizer, arm.name, none))
            for arm in ARMS
            if arm != UNIFORM and arm.name.startswith(tuple(VARIANCE_CONTROLS))
            if f"KL {BUDGET:g}" in arm.name and arm.name != none
        ]
        apart = [f"{name} {signed(gap)}" for name, gap in losses if clear(gap)]
        uniform = paired(result, optimizer, default, UNIFORM.name)
        found.append(
            (
                f"Held-out loss less that without control: {'; '.join(apart)}"
                + ("; no clear difference in the others." if len(apart) < len(losses) else ".")
                if apart
                else "No control changes the held-out loss clearly against none ("
                + ", ".join(f"{name} {signed(gap)}" for name, gap in losses)
                + ")."
            )
            + f' Against uniform weights "{DEFAULT_MODE}" ends at '
            f"{signed(uniform)}{'' if clear(uniform) else ', no clear difference'}."
        )
        sharp, bare = (f"{mode}, KL {SHARP:g}" for mode in (DEFAULT_MODE, "none"))
        found.append(
            f"At {SHARP:g} nats the variance is {mean('noise', sharp):.3g} with it and "
            f"{mean('noise', bare):.3g} without, spikes {mean('spikes', sharp):.1f} and "
            f"{mean('spikes', bare):.1f}; loss: "
            f"{_difference(paired(result, optimizer, sharp, bare), 'with less without', 4)}."
        )
    return found


def _difference(value: Interval, what: str, digits: int) -> str:
    text = f"{signed(value, digits)} {what}"
    return text if clear(value) else f"{text}, no clear difference"


# ---- the plot ----

COLOURS = {
    "utility": "#c8452f",
    "trajectory": "#c98a1b",
    "ess": "#2a9d6f",
    "loss": "#8d5fb0",
    "none": "#3b6fb6",
}


def _look(arm: str) -> dict[str, Any]:
    if arm == UNIFORM.name:
        return {"color": "#333333"}
    style = ":" if "cap" in arm else "--" if f"KL {SHARP:g}" in arm else "-"
    return {"color": COLOURS[arm.split(",")[0]], "linestyle": style}


def plot(result: dict[str, Any], path: Path) -> None:
    names = [arm.name for arm in ARMS]
    with figure(path, 2, 4, size=(15.5, 7.6)) as (drawn, grid):
        handles: dict[str, Any] = {}
        for line, (optimizer, title) in zip(grid, OPTIMIZERS.items(), strict=True):
            loss, alpha, variance, spiked = line
            for name in names:
                runs = _runs(result, optimizer, name)
                base = _runs(result, optimizer, UNIFORM.name)
                gaps = [
                    fmean(run["loss"][k] - b["loss"][k] for run, b in zip(runs, base, strict=True))
                    for k in range(len(runs[0]["steps"]))
                ]
                handles[name] = loss.plot(runs[0]["steps"], gaps, **_look(name))[0]
                if name != UNIFORM.name:
                    means = [fmean(run["alpha"][k] for run in runs) for k in range(len(gaps) - 1)]
                    middles = [
                        (a + b) / 2
                        for a, b in zip(runs[0]["steps"], runs[0]["steps"][1:], strict=False)
                    ]
                    alpha.plot(middles, means, **_look(name))
            loss.set(
                title=f"{title}: held-out loss less uniform's",
                xlabel="optimizer step",
                ylabel="nats a token; below 0 is better",
            )
            alpha.set(title="alpha along the run", xlabel="optimizer step", ylim=(0, None))
            _bars(variance, {name: _values(result, optimizer, name, "noise") for name in names})
            variance.set(title="gradient variance", xscale="log", yticks=range(len(names)))
            variance.set_yticklabels(names)
            _bars(spiked, {name: _values(result, optimizer, name, "spikes") for name in names})
            spiked.set(title="spikes a run", yticks=range(len(names)))
            spiked.margins(x=0.05)
            spiked.set_yticklabels([])
        drawn.suptitle(headline(result), fontsize=12)
        drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)


def headline(result: dict[str, Any]) -> str:
    """The plot's title: what is seen."""
    default, none = (f"{mode}, KL {BUDGET:g}" for mode in (DEFAULT_MODE, "none"))
    parts = []
    for optimizer, title in OPTIMIZERS.items():
        shares = [
            fmean(_values(result, optimizer, default, name))
            / fmean(_values(result, optimizer, none, name))
            for name in ("noise", "relative_noise")
        ]
        loss = paired(result, optimizer, default, none)
        parts.append(
            f"{title} {shares[0]:.2f} ({shares[1]:.2f} of that over norm²), loss {loss.mean:+.3f}"
            f"{'' if clear(loss) else ' (no clear difference)'}"
        )
    return f'"{DEFAULT_MODE}" over no control, gradient variance: {"; ".join(parts)}'


def _bars(axes: Any, values: dict[str, list[float]]) -> None:
    """Mean over seeds as a bar, every seed as a dot."""
    for place, (name, seeds) in enumerate(values.items()):
        colour = _look(name)["color"]
        axes.barh(place, fmean(seeds), color=colour, alpha=0.45)
        axes.plot(seeds, [place] * len(seeds), "o", color=colour, ms=3)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
