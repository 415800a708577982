"""Ways to supervise at equal steps and at equal time, in the domain and outside it.

All arms of a seed begin at the same weights. At equal steps they see the same batches; at equal
time each takes as many steps as the time of VCORE's run buys, with a learning rate that falls to
zero over them, and more data with them: no row comes twice.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vcore_train.config import DEFAULT_KL_BUDGET
from vcore_train.experiments.arithmetic_task import (
    DATA,
    DFT,
    FULL,
    IN_DOMAIN,
    QUICK,
    SETS,
    SFT,
    VCORE,
    Arm,
    TaskSetting,
    by_seed,
    figure_of,
    fine_tune,
    make_starts,
    paired,
    percent,
    plain_log,
    signed,
    step_ratios,
    transformed,
    verdict,
)
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import Context
from vcore_train.experiments.statistics import Interval, interval
from vcore_train.experiments.workers import in_pool, workers
from vcore_train.plots import COLOURS

__all__ = ["DATA", "FULL", "QUICK", "measure", "plot", "reading", "records", "tables"]

UNWEIGHTED = (  # by utilities: these take about the time of SFT
    SFT,
    Arm("Random", {"method": "random"}),
    DFT,
    Arm("iw-SFT", {"method": "iw_sft"}),
)
BUDGETS = (
    VCORE,
    Arm("VCORE, KL 0.005", {"method": "vcore", "kl_budget": 0.005}),
    Arm("VCORE, KL 0.1", {"method": "vcore", "kl_budget": 0.1}),
)
ARMS = (*UNWEIGHTED, *BUDGETS)
STEPS, TIME, BOTH = "steps", "time", "both"  # what is equal
EQUAL = {STEPS: "equal steps", TIME: "equal time"}


def run_record(
    setting: TaskSetting, seed: int, weights: Path, arm: Arm, equal: str, steps: int
) -> dict[str, Any]:
    _, found = fine_tune(setting, seed, weights, arm, steps=steps)
    return {"seed": seed, "arm": arm.name, "equal": equal, "steps": steps, **found}


def steps_at_equal_time(steps: int, ratios: dict[str, float]) -> dict[str, int]:
    """Of each arm without utilities, in the time of ``steps`` of VCORE.

    Ratios of step times are rounded to quarters, so that one measurement gives the steps of
    another.
    """
    rounded = {name: max(round(4 * ratio), 1) / 4 for name, ratio in ratios.items()}
    return {arm.name: round(steps * rounded[VCORE.name] / rounded[arm.name]) for arm in UNWEIGHTED}


def measure(context: Context) -> dict[str, Any]:
    """``starts``: how they are judged; ``ratios``: step times over SFT's; ``runs``: a record each.

    Runs of VCORE stand for both comparisons. Step times are taken while nothing else runs.
    """
    setting = context.setting
    assert isinstance(setting, TaskSetting)
    with workers() as pool:
        weights, starts = make_starts(pool, context, "methods")
        timed = (setting, 0, weights[0], (*UNWEIGHTED, VCORE))
        ratios = in_pool(pool, context, "Step times", step_ratios, [timed])[0]
        more = steps_at_equal_time(setting.steps, ratios)
        jobs: list[tuple[Any, ...]] = []
        for seed, file in weights.items():
            jobs += [(setting, seed, file, arm, BOTH, setting.steps) for arm in BUDGETS]
            jobs += [(setting, seed, file, arm, TIME, more[arm.name]) for arm in UNWEIGHTED]
            jobs += [(setting, seed, file, arm, STEPS, setting.steps) for arm in UNWEIGHTED]
        runs = in_pool(pool, context, "Runs", run_record, jobs)
    return {"starts": starts, "ratios": ratios, "runs": runs}


# ---- what is shown ----


def runs_of(result: dict[str, Any], arm: str, equal: str) -> list[dict[str, Any]]:
    """One a seed."""
    return [r for r in result["runs"] if r["arm"] == arm and r["equal"] in (equal, BOTH)]


def gap(result: dict[str, Any], arm: str, equal: str, figure: str, name: str) -> Interval:
    """``figure`` ("loss" or "accuracy") on the set ``name``, less SFT's, paired by seed."""
    base = runs_of(result, SFT.name, equal)
    return paired(runs_of(result, arm, equal), base, figure, name)


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each run, and each start with the steps before it, and set of problems."""
    starts = [{**s, "arm": "start", "equal": BOTH} for s in result["starts"]]
    return [
        {
            **{key: run[key] for key in ("seed", "arm", "equal", "steps")},
            "set": name,
            "loss": run["loss"][name],
            "accuracy": run["accuracy"][name],
        }
        for run in [*starts, *result["runs"]]
        for name in SETS
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    headings = (
        *("supervision", "steps", "step time", "held-out loss"),
        *(f"{name}, %" for name in SETS),
        *(f"{name} minus SFT's" for name in SETS),
    )
    found = []
    for equal, title in EQUAL.items():
        rows = [_row("start", result["starts"], None, "", [])] if equal == STEPS else []
        for arm in (a.name for a in ARMS):
            runs = runs_of(result, arm, equal)
            gaps = [percent(gap(result, arm, equal, "accuracy", name)) for name in SETS]
            signs = [] if arm == SFT.name else [signed(points, 1) for points in gaps]
            ratio = result["ratios"].get(arm)
            rows.append(_row(arm, runs, runs[0]["steps"], "" if ratio is None else ratio, signs))
        found.append(Table(title.capitalize(), headings, rows, note=NOTE))
    return found


def _row(
    arm: str,
    runs: Sequence[dict[str, Any]],
    steps: int | None,
    ratio: float | str,
    gaps: Sequence[str],
) -> list[str]:
    return [
        arm,
        "" if steps is None else str(steps),
        ratio if isinstance(ratio, str) else f"{ratio:.2f}",
        interval([r["loss"][IN_DOMAIN] for r in runs]).text(4),
        *(percent(interval([r["accuracy"][name] for r in runs])).text(1) for name in SETS),
        *(gaps or [""] * len(SETS)),
    ]


NOTE = (
    "Held-out loss: nats a token on in-domain problems. Accuracy: exact match of greedy responses. "
    "Differences are in points and paired by seed. Step time: over SFT's, medians of interleaved "
    "rounds; the forward pass that iw-SFT takes over its data first is not in it. VCORE without a "
    f"budget has {DEFAULT_KL_BUDGET:g} nats; the others take as long."
)


def reading(result: dict[str, Any]) -> list[str]:
    """What is seen, each sentence with its figures."""
    start = [percent(interval([s["accuracy"][n] for s in result["starts"]])).mean for n in SETS]
    lines = [
        f"The starts solve {start[0]:.0f}% of the in-domain problems, {start[1]:.0f}% of the "
        f"harder ones and {start[2]:.0f}% of the stories."
    ]
    for equal, title in EQUAL.items():
        base = runs_of(result, SFT.name, equal)
        sft = [percent(interval([r["accuracy"][n] for r in base])).mean for n in SETS]
        lines.append(
            f"At {title} SFT ({base[0]['steps']} steps) ends at {sft[0]:.1f}%, {sft[1]:.1f}% and "
            f"{sft[2]:.1f}%."
        )
        lines += [_compared(result, arm.name, equal) for arm in ARMS[1:]]
    ratio = result["ratios"][VCORE.name]
    lines.append(f"A step of VCORE takes {ratio:.2f} times the time of one of SFT.")
    return lines


def _compared(result: dict[str, Any], arm: str, equal: str) -> str:
    """How an arm differs from SFT: the loss, then accuracies by what they say."""
    loss = gap(result, arm, equal, "loss", IN_DOMAIN)
    said = [f"loss {signed(loss, 4)} nats ({verdict(loss, higher_is_better=False)})"]
    points = {name: percent(gap(result, arm, equal, "accuracy", name)) for name in SETS}
    for judgement in ("better", "worse", "no clear difference"):
        those = [
            f"{name} ({signed(value, 1)} points)"
            for name, value in points.items()
            if verdict(value, higher_is_better=True) == judgement
        ]
        said += [f"{judgement}: {', '.join(those)}"] if those else []
    steps = runs_of(result, arm, equal)[0]["steps"]
    return f"{arm} ({steps} steps) minus SFT: {'; '.join(said)}."


def loss_ratio(result: dict[str, Any], arm: str, equal: str) -> Interval:
    """Held-out loss over SFT's: geometric mean over seeds, the interval taken of logarithms."""
    pairs = by_seed(runs_of(result, arm, equal), runs_of(result, SFT.name, equal))
    keys = "loss", IN_DOMAIN
    logs = interval([math.log(figure_of(r, *keys) / figure_of(b, *keys)) for r, b in pairs])
    return transformed(math.exp, logs)


def plot(result: dict[str, Any], path: Path) -> None:
    arms = ARMS[1:]
    with figure(path, 1, 4, size=(12.5, 4.4), sharey=True) as (drawn_on, grid):
        for equal, shift, face in ((STEPS, -0.14, None), (TIME, 0.14, "white")):
            for place, arm in enumerate(arms):
                found = [loss_ratio(result, arm.name, equal)]
                found += [percent(gap(result, arm.name, equal, "accuracy", n)) for n in SETS]
                colour = COLOURS[arm.options["method"]]
                for axes, value in zip(grid, found, strict=True):
                    axes.errorbar(
                        value.mean,
                        place + shift,
                        xerr=[[value.mean - value.low], [value.high - value.mean]],
                        color=colour,
                        marker="o",
                        markerfacecolor=face or colour,
                        capsize=2,
                    )
        for axes, name in zip(grid[1:], SETS, strict=True):
            axes.axvline(0, color="#3b6fb6", linewidth=1.2)
            axes.set(title=f"Accuracy, {name}", xlabel="points above SFT (right is better)")
        grid[0].axvline(1, color="#3b6fb6", linewidth=1.2)
        grid[0].set(
            title="Held-out loss, in-domain",
            xlabel="times SFT's (left is better)",
            xscale="log",
            yticks=range(len(arms)),
            yticklabels=[arm.name for arm in arms],
        )
        plain_log(grid[0].xaxis)
        grid[0].invert_yaxis()
        for equal, face in ((STEPS, "#555555"), (TIME, "white")):
            grid[0].plot(
                *([], []), marker="o", ls="", c="#555555", markerfacecolor=face, label=EQUAL[equal]
            )
        handles, labels = grid[0].get_legend_handles_labels()
        drawn_on.legend(handles, labels, loc="outside lower center", ncols=2)
        drawn_on.suptitle(_title(result), size=11)


def _title(result: dict[str, Any]) -> str:
    parts = []
    for equal, title in EQUAL.items():
        found = gap(result, VCORE.name, equal, "accuracy", IN_DOMAIN)
        says = verdict(found, higher_is_better=True)
        parts.append(f"{says} at {title}")
    return (
        f"VCORE against SFT (blue line), in-domain accuracy: {', '.join(parts)} "
        "(lines: 95% intervals over seeds)"
    )
