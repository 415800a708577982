"""How many supervised examples: held-out loss and accuracy after a fixed number of steps.

Small sets go round many times in them. All arms of a seed begin at the same weights, a smaller set
is the beginning of a larger one, and arms with the same set see the same batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vcore_train.evaluation import row_losses
from vcore_train.experiments import arithmetic_task
from vcore_train.experiments.arithmetic_task import (
    DATA,
    DFT,
    IN_DOMAIN,
    SETS,
    SFT,
    VCORE,
    Arm,
    TaskSetting,
    figure_of,
    fine_tune,
    make_starts,
    paired,
    percent,
    plain_log,
    seed_rows,
    signed,
    verdict,
)
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import Context
from vcore_train.experiments.statistics import Interval, interval
from vcore_train.experiments.workers import in_pool, workers
from vcore_train.plots import COLOURS

__all__ = ["DATA", "FULL", "QUICK", "measure", "plot", "reading", "records", "tables"]

ARMS = (SFT, DFT, VCORE)


@dataclass(frozen=True)
class SizeSetting(TaskSetting):
    """``sizes``: examples in the supervised sets, ascending."""

    sizes: tuple[int, ...] = (32, 128, 512, 2048)


FULL = SizeSetting(**{**vars(arithmetic_task.FULL), "steps": 128, "judged": 8})
QUICK = SizeSetting(**{**vars(arithmetic_task.QUICK), "sizes": (4, 16)})


def run_record(
    setting: TaskSetting, seed: int, weights: Path, arm: Arm, size: int
) -> dict[str, Any]:
    rows = seed_rows(setting, seed, size)
    model, found = fine_tune(setting, seed, weights, arm, rows=rows)
    return {
        "seed": seed,
        "arm": arm.name,
        "size": size,
        "train_loss": row_losses(model, rows[: setting.held_out]).mean,
        "rise": rise(found["curve"]),
        **found,
    }


def rise(curve: Sequence[float]) -> float:
    """How far the last value stands above the least: 0 where a loss still falls at the end."""
    return curve[-1] - min(curve)


def measure(context: Context) -> dict[str, Any]:
    """``starts``: how they are judged; ``runs``: a record for each seed, size and arm."""
    setting = context.setting
    assert isinstance(setting, SizeSetting)
    with workers() as pool:
        weights, starts = make_starts(pool, context, "supervised_size")
        jobs = [
            (setting, seed, file, arm, size)
            for seed, file in weights.items()
            for size in setting.sizes
            for arm in ARMS
        ]
        runs = in_pool(pool, context, "Runs", run_record, jobs)
    return {"starts": starts, "steps": setting.steps, "batch": setting.batch_size, "runs": runs}


# ---- what is shown ----


def runs_of(result: dict[str, Any], arm: str, size: int) -> list[dict[str, Any]]:
    """One a seed."""
    return [r for r in result["runs"] if (r["arm"], r["size"]) == (arm, size)]


def sizes_of(result: dict[str, Any]) -> list[int]:
    return sorted({r["size"] for r in result["runs"]})


def rises(result: dict[str, Any], arm: str, size: int) -> Interval:
    return interval([r["rise"] for r in runs_of(result, arm, size)])


def gap(result: dict[str, Any], arm: str, size: int, *keys: str) -> Interval:
    """Of a figure, less SFT's, paired by seed."""
    return paired(runs_of(result, arm, size), runs_of(result, SFT.name, size), *keys)


def overfits(result: dict[str, Any], arm: str) -> list[int]:
    """The sizes at which held-out loss ends clearly above its least value."""
    return [size for size in sizes_of(result) if rises(result, arm, size).low > 0]


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each run."""
    keys = ("seed", "arm", "size", "train_loss", "rise")
    return [
        {
            **{key: run[key] for key in keys},
            **{f"loss, {name}": run["loss"][name] for name in SETS},
            **{f"accuracy, {name}": run["accuracy"][name] for name in SETS},
        }
        for run in result["runs"]
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    rows = []
    for size in sizes_of(result):
        for arm in (a.name for a in ARMS):
            runs = runs_of(result, arm, size)
            epochs = result["steps"] * result["batch"] / size
            rows.append(
                [
                    *(arm, str(size), f"{epochs:g}"),
                    interval([r["train_loss"] for r in runs]).text(4),
                    interval([r["loss"][IN_DOMAIN] for r in runs]).text(4),
                    rises(result, arm, size).text(4),
                    "" if arm == SFT.name else signed(gap(result, arm, size, "loss", IN_DOMAIN), 4),
                    percent(interval([r["accuracy"][IN_DOMAIN] for r in runs])).text(1),
                    ""
                    if arm == SFT.name
                    else signed(percent(gap(result, arm, size, "accuracy", IN_DOMAIN)), 1),
                ]
            )
    headings = (
        *("supervision", "examples", "epochs", "training loss", "held-out loss", "rise"),
        *("minus SFT's", "accuracy, %", "minus SFT's"),
    )
    note = (
        "Losses in nats a token, training loss at the end. Rise: how far the held-out loss ends "
        "above its least value along the run. Differences are paired by seed."
    )
    return [Table(f"After {result['steps']} steps", headings, rows, text=1, note=note)]


def reading(result: dict[str, Any]) -> list[str]:
    """What is seen, each sentence with its figures."""
    lines = []
    sizes = sizes_of(result)
    for arm in (a.name for a in ARMS):
        ends = [interval([r["loss"][IN_DOMAIN] for r in runs_of(result, arm, s)]) for s in sizes]
        rights = [
            percent(interval([r["accuracy"][IN_DOMAIN] for r in runs_of(result, arm, s)]))
            for s in sizes
        ]
        lines.append(
            f"{arm}: held-out loss {', '.join(f'{v.mean:.3f}' for v in ends)} and accuracy "
            f"{', '.join(f'{v.mean:.1f}' for v in rights)}% with "
            f"{', '.join(map(str, sizes))} examples."
        )
        over = overfits(result, arm)
        smallest = rises(result, arm, sizes[0])
        if over:
            lines.append(
                f"{arm} over-fits with {_listed(over)}: with {over[-1]} the loss ends "
                f"{rises(result, arm, over[-1]).text(4)} nats above its least value."
            )
        else:
            lines.append(
                f"{arm} over-fits clearly at no size: with {sizes[0]} examples the loss ends "
                f"{smallest.text(4)} nats above its least value."
            )
    for arm in (a.name for a in ARMS[1:]):
        parts = []
        for size in sizes:
            loss = gap(result, arm, size, "loss", IN_DOMAIN)
            points = percent(gap(result, arm, size, "accuracy", IN_DOMAIN))
            parts.append(
                f"with {size} loss {signed(loss, 4)} ({verdict(loss, higher_is_better=False)}), "
                f"{signed(points, 1)} points ({verdict(points, higher_is_better=True)})"
            )
        lines.append(f"{arm} minus SFT: {'; '.join(parts)}.")
        rose = [(size, gap(result, arm, size, "rise")) for size in overfits(result, SFT.name)]
        if rose:
            parts = [
                f"{signed(value, 4)} with {size} ({verdict(value, higher_is_better=False)})"
                for size, value in rose
            ]
            lines.append(f"Where SFT over-fits, {arm} rises by {', '.join(parts)} against it.")
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    sizes = sizes_of(result)
    with figure(path, 1, 4, size=(15, 4.3)) as (drawn_on, (ends, curve, right, gaps)):
        for place, arm in enumerate(ARMS):
            colour = COLOURS[arm.options["method"]]

            def means(*keys: str, arm: Arm = arm) -> list[float]:
                runs = (runs_of(result, arm.name, size) for size in sizes)
                return [interval([figure_of(r, *keys) for r in of_size]).mean for of_size in runs]

            style = {"color": colour, "marker": "o", "label": arm.name}
            ends.plot(sizes, means("loss", IN_DOMAIN), **style)
            ends.plot(sizes, means("train_loss"), color=colour, linestyle=":", marker=".")
            right.plot(sizes, [100 * share for share in means("accuracy", IN_DOMAIN)], **style)
            if arm is SFT:
                continue
            apart = [size * (0.92 if place == 1 else 1.08) for size in sizes]
            points = [percent(gap(result, arm.name, s, "accuracy", IN_DOMAIN)) for s in sizes]
            heights, halves = [p.mean for p in points], [p.half for p in points]
            gaps.errorbar(apart, heights, halves, capsize=2, **style)
        for place, size in enumerate(sizes):
            shade = 0.25 + 0.75 * (place + 1) / len(sizes)
            for arm, dashes in ((SFT, "-"), (VCORE, "--")):
                runs = runs_of(result, arm.name, size)
                values = zip(*(r["curve"] for r in runs), strict=True)
                along = [interval(of_seeds).mean for of_seeds in values]
                curve.plot(
                    runs[0]["curve_steps"],
                    along,
                    color=COLOURS[arm.options["method"]],
                    alpha=shade,
                    linestyle=dashes,
                    label=arm.name if place == len(sizes) - 1 else None,
                )
                if arm is SFT:
                    end = (runs[0]["curve_steps"][-1], along[-1])
                    curve.annotate(
                        f"{size}", end, (4, 0), textcoords="offset points", va="center", size=8
                    )
        for axes in (ends, right, gaps):
            axes.set(xscale="log", xlabel="supervised examples")
            axes.set_xticks(sizes, [str(s) for s in sizes])
            axes.minorticks_off()
        ends.set(
            title="Held-out loss (dotted: training loss)",
            ylabel=f"nats a token after {result['steps']} steps",
            yscale="log",
        )
        curve.set(
            title="Along the run, by examples",
            xlabel="optimizer step",
            ylabel="held-out loss (nats a token)",
            yscale="log",
        )
        right.set(title="In-domain accuracy", ylabel="exact match, %")
        gaps.set(title="Accuracy minus SFT's", ylabel="points (lines: 95% intervals)")
        gaps.axhline(0, color=COLOURS["sft"], linewidth=1.4)
        for axes in (ends, curve):
            plain_log(axes.yaxis)
        for axes in (ends, curve, right, gaps):
            axes.legend(fontsize=8)
        drawn_on.suptitle(_title(result), size=11)


def _title(result: dict[str, Any]) -> str:
    parts = []
    for arm in (a.name for a in ARMS):
        over = overfits(result, arm)
        parts.append(f"{arm} {f'with {_listed(over)} examples' if over else 'not clearly'}")
    return f"Held-out loss ends above its least value: {', '.join(parts)}"


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))
