"""How large a probe batch: what a step costs, how good its utilities are, how the run ends.

All arms of a seed begin at the same weights and see the same batches; only the number of examples
that VCORE takes its direction from differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from vcore_train.directions import descent_direction
from vcore_train.experiments import arithmetic_task
from vcore_train.experiments.arithmetic_task import (
    DATA,
    IN_DOMAIN,
    SETS,
    SFT,
    Arm,
    TaskSetting,
    fine_tune,
    load_start,
    make_starts,
    paired,
    percent,
    signed,
    step_ratios,
    task,
    verdict,
)
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import (
    Batch,
    Context,
    Row,
    batches,
    collate,
    drawn,
    supervised,
)
from vcore_train.experiments.statistics import Interval, interval, pearson, within
from vcore_train.experiments.workers import in_pool, workers
from vcore_train.plots import COLOURS
from vcore_train.utilities import token_utilities

__all__ = ["DATA", "FULL", "QUICK", "measure", "plot", "reading", "records", "tables"]


@dataclass(frozen=True)
class ProbeSetting(TaskSetting):
    """``sizes``: of the probe batch, ascending. ``averaged``: rows in the reference's direction;
    ``draws``: probes of each size that are held against it."""

    sizes: tuple[int, ...] = (1, 4, 16, 64)
    averaged: int = 512
    draws: int = 4


FULL = ProbeSetting(**vars(arithmetic_task.FULL))
QUICK = ProbeSetting(**{**vars(arithmetic_task.QUICK), "sizes": (1, 8), "averaged": 16, "draws": 2})
START, END = "start", "end of SFT"  # where utilities are judged


def probe_arm(size: int) -> Arm:
    return Arm(f"probe of {size}", {"method": "vcore", "probe_batch_size": size})


def arms_of(sizes: Sequence[int]) -> list[Arm]:
    return [SFT, *map(probe_arm, sizes)]


# ---- the quality of a direction ----


def quality(model: PreTrainedModel, setting: ProbeSetting, seed: int, at: str) -> dict[str, Any]:
    """r of the utilities against small probes with those against a large one, for each size.

    One batch of rows is judged; reference and probes are drawn from the others. ``pearson``: over
    all supervised tokens; ``within``: in a trajectory, the median. Both are means over draws.
    """
    rows = drawn(task(setting).rows, len(task(setting).rows), 1000 + seed)
    judged, rest = collate(_plain(rows[: setting.batch_size])), rows[setting.batch_size :]
    population, pool = rest[: setting.averaged], rest[setting.averaged :]
    truth, mask = utilities(model, judged, population), supervised(judged)
    found: dict[str, Any] = {"seed": seed, "at": at, "pearson": {}, "within": {}}
    for size in setting.sizes:
        both: list[tuple[float, float]] = []
        for draw in range(setting.draws):
            probe = drawn(pool, size, 7919 * seed + 31 * draw + size)
            own = utilities(model, judged, probe)
            inside = within(pearson, own, truth, mask)
            both.append((pearson(own[mask], truth[mask]), float(inside.median())))
        for name, values in zip(("pearson", "within"), zip(*both, strict=True), strict=True):
            found[name][str(size)] = sum(values) / len(values)
    return found


def utilities(model: PreTrainedModel, judged: Batch, rows: Sequence[Row]) -> Tensor:
    """[B, T] of the judged batch, against the gradient of the uniform loss over ``rows``."""
    direction = descent_direction(model, batches(_plain(rows), 16), kind="probe")
    return token_utilities(model, judged, direction)


def _plain(rows: Sequence[Row]) -> list[Row]:
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


# ---- the study ----


def run_record(
    setting: ProbeSetting, seed: int, weights: Path, arm: Arm, size: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run, and from the one of SFT (``size`` 0) the quality at its beginning and its end."""
    model, found = fine_tune(setting, seed, weights, arm)
    record = {"seed": seed, "arm": arm.name, "size": size, **found}
    if size:
        return record, []
    start = load_start(setting, seed, weights)
    return record, [quality(start, setting, seed, START), quality(model, setting, seed, END)]


def measure(context: Context) -> dict[str, Any]:
    """``ratios``: step times over SFT's; ``runs``: a record for each seed and size, 0 for SFT;
    ``quality``: one for each seed, at the start and at the end of the run of SFT."""
    setting = context.setting
    assert isinstance(setting, ProbeSetting)
    arms = arms_of(setting.sizes)
    with workers() as pool:
        weights, starts = make_starts(pool, context, "probe_size")
        timed = (setting, 0, weights[0], arms)
        ratios = in_pool(pool, context, "Step times", step_ratios, [timed])[0]
        jobs = [
            (setting, seed, file, arm, size)
            for seed, file in weights.items()
            for arm, size in zip(arms, (0, *setting.sizes), strict=True)
        ]
        done = in_pool(pool, context, "Runs", run_record, jobs)
    return {
        "starts": starts,
        "averaged": setting.averaged,
        "ratios": ratios,
        "runs": [run for run, _ in done],
        "quality": [record for _, found in done for record in found],
    }


# ---- what is shown ----


def runs_of(result: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """One a seed; 0 is SFT."""
    return [r for r in result["runs"] if r["size"] == size]


def sizes_of(result: dict[str, Any]) -> list[int]:
    return sorted({r["size"] for r in result["runs"]} - {0})


def ratio_of(result: dict[str, Any], size: int) -> float:
    return result["ratios"][probe_arm(size).name]


def correlation(result: dict[str, Any], size: int, at: str, kind: str = "pearson") -> Interval:
    return interval([q[kind][str(size)] for q in result["quality"] if q["at"] == at])


def fall(result: dict[str, Any], size: int) -> Interval:
    """Of the correlation from the start to the end of the run of SFT, paired by seed."""
    start, end = ([q for q in result["quality"] if q["at"] == at] for at in (START, END))
    return paired(end, start, "pearson", str(size))


def gap(result: dict[str, Any], size: int, *keys: str) -> Interval:
    """Of a figure, less SFT's, paired by seed."""
    return paired(runs_of(result, size), runs_of(result, 0), *keys)


def records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each run; probe 0 is SFT. The correlations are those of the seed and size."""
    judged = {(q["seed"], q["at"]): q["pearson"] for q in result["quality"]}
    return [
        {
            "seed": run["seed"],
            "probe": run["size"],
            "step_time": result["ratios"][run["arm"]],
            **{f"loss, {name}": run["loss"][name] for name in SETS},
            **{f"accuracy, {name}": run["accuracy"][name] for name in SETS},
            **{f"r, {at}": judged[run["seed"], at].get(str(run["size"])) for at in (START, END)},
        }
        for run in result["runs"]
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    rows = []
    for size in (0, *sizes_of(result)):
        runs = runs_of(result, size)
        loss = interval([r["loss"][IN_DOMAIN] for r in runs]).text(4)
        right = percent(interval([r["accuracy"][IN_DOMAIN] for r in runs])).text(1)
        if not size:
            rows.append([SFT.name, "1.00", "", "", "", loss, "", right, ""])
            continue
        rows.append(
            [
                probe_arm(size).name,
                f"{ratio_of(result, size):.2f}",
                correlation(result, size, START).text(2),
                correlation(result, size, START, "within").text(2),
                correlation(result, size, END).text(2),
                loss,
                signed(gap(result, size, "loss", IN_DOMAIN), 4),
                right,
                signed(percent(gap(result, size, "accuracy", IN_DOMAIN)), 1),
            ]
        )
    headings = (
        *("supervision", "step time", "r at the start", "within", "r at the end", "held-out loss"),
        *("minus SFT's", "accuracy, %", "minus SFT's"),
    )
    note = (
        "Step time: over SFT's, medians of interleaved rounds. r: Pearson correlation of utilities "
        f"with those against a gradient over {result['averaged']} rows at the same parameters, at "
        "the start and at the end of the run of SFT; within: in a trajectory, the median. "
        "Differences are paired by seed."
    )
    return [Table("Probe batches of VCORE", headings, rows, note=note)]


def reading(result: dict[str, Any]) -> list[str]:
    """What is seen, each sentence with its figures."""
    sizes = sizes_of(result)
    names = ", ".join(map(str, sizes))

    def listed(values: Sequence[float], digits: int) -> str:
        return ", ".join(f"{value:.{digits}f}" for value in values)

    lines = [
        f"With probes of {names} a step takes "
        f"{listed([ratio_of(result, s) for s in sizes], 2)} times the time of one of SFT.",
        "Utilities correlate with those of a large average with r = "
        f"{listed([correlation(result, s, START).mean for s in sizes], 2)} at the start and "
        f"{listed([correlation(result, s, END).mean for s in sizes], 2)} at the end of SFT's run.",
    ]
    falls = (f"{signed(fall(result, size), 2)} with {size}" for size in sizes)
    lines.append(f"From the start to the end r changes by {', '.join(falls)}.")
    for size in sizes:
        loss = gap(result, size, "loss", IN_DOMAIN)
        points = percent(gap(result, size, "accuracy", IN_DOMAIN))
        lines.append(
            f"A probe of {size} ends {signed(loss, 4)} nats from SFT in held-out loss "
            f"({verdict(loss, higher_is_better=False)}) and {signed(points, 1)} points in accuracy "
            f"({verdict(points, higher_is_better=True)})."
        )
    loss = change(result, "loss", IN_DOMAIN)
    points = percent(change(result, "accuracy", IN_DOMAIN))
    lines.append(
        f"From {sizes[0]} to {sizes[-1]} rows in the probe the loss changes by {signed(loss, 4)} "
        f"nats ({verdict(loss, higher_is_better=False)}) and the accuracy by {signed(points, 1)} "
        f"points ({verdict(points, higher_is_better=True)})."
    )
    return lines


def plot(result: dict[str, Any], path: Path) -> None:
    sizes = sizes_of(result)
    times = [ratio_of(result, size) for size in sizes]
    with figure(path, 1, 3, size=(12.5, 4.2)) as (drawn_on, grid):
        for at, colour in ((START, COLOURS["vcore"]), (END, "#e8917f")):
            _points(grid[0], times, [correlation(result, s, at) for s in sizes], colour, at)
        _points(
            grid[1], times, [gap(result, s, "loss", IN_DOMAIN) for s in sizes], COLOURS["vcore"]
        )
        found = [percent(gap(result, s, "accuracy", IN_DOMAIN)) for s in sizes]
        _points(grid[2], times, found, COLOURS["vcore"])
        for axes in grid:
            low, high = axes.get_ylim()
            for place, (time, size) in enumerate(zip(times, sizes, strict=True)):
                lift = (0, 2 + 9 * (place % 2))  # small probes cost nearly the same
                axes.annotate(
                    *(f"{size}", (time, high), lift),
                    textcoords="offset points",
                    ha="center",
                    size=8,
                    color="#555555",
                )
            axes.set(
                xlabel="time of a step, in steps of SFT",
                ylim=(low, high),
                xlim=(1, 1.05 * times[-1]),
            )
        for axes in grid[1:]:
            axes.axhline(0, color=COLOURS["sft"], linewidth=1.4)
            axes.annotate(
                "SFT", (1, 0), (2, 2), textcoords="offset points", color=COLOURS["sft"], size=9
            )
        grid[0].set(ylabel="r with a large average's utilities")
        grid[0].legend(fontsize=8, loc="lower right")
        grid[1].set(ylabel="nats a token (below 0 is better)")
        grid[2].set(ylabel="points (above 0 is better)")
        for axes, title in zip(
            grid,
            ("Quality of the utilities", "Held-out loss minus SFT's", "Accuracy minus SFT's"),
            strict=True,
        ):
            axes.set_title(f"{title}\n(above: rows in the probe)", pad=20)
        few, many = (correlation(result, size, START).mean for size in (sizes[0], sizes[-1]))
        says = verdict(change(result, "loss", IN_DOMAIN), higher_is_better=False)
        drawn_on.suptitle(
            f"{sizes[0]} to {sizes[-1]} rows in the probe: r {few:.2f} to {many:.2f}, "
            f"{times[0]:.1f} to {times[-1]:.1f} times SFT's step; loss: {says}",
            size=11,
        )


def change(result: dict[str, Any], *keys: str) -> Interval:
    """Of a figure from the smallest probe to the largest, paired by seed."""
    sizes = sizes_of(result)
    return paired(runs_of(result, sizes[-1]), runs_of(result, sizes[0]), *keys)


def _points(
    axes: Any, times: Sequence[float], found: Sequence[Interval], colour: str, label: str = ""
) -> None:
    means, halves = [f.mean for f in found], [f.half for f in found]
    axes.errorbar(times, means, halves, color=colour, marker="o", capsize=2, label=label)
