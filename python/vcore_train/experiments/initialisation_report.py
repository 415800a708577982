"""What the runs of the study initialisation come to: tables, sentences, the CSV and the plot."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.ticker import PercentFormatter

from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.statistics import Interval, interval, pearson
from vcore_train.plots import COLOURS, LABELS

METHODS = ("sft", "dft", "vcore")
REFERENCE = METHODS[0]  # what the others are compared with
BASE = "base"
ARMS = ("GRPO", "RAFT++", "GVM-RAFT++")
CONTROL = "more SFT"  # as many steps, at a learning rate of reinforcement learning
GVM, UNIFORM = "GVM-RAFT++", "RAFT++"
GREEDY, SAMPLED = "accuracy", "sampled"
NAMES = {BASE: "base", **LABELS}
PAINT = {BASE: COLOURS["start"], **COLOURS}
Record = dict[str, Any]


# ---- what is compared ----


def _starts(result: Record, start: str) -> list[Record]:
    """One a seed."""
    return [record for record in result["starts"] if record["start"] == start]


def _runs(result: Record, arm: str, start: str) -> list[Record]:
    """One a seed."""
    return [run for run in result["runs"] if (run["arm"], run["start"]) == (arm, start)]


def end(run: Record, what: str) -> float:
    """``"accuracy"`` (greedy) or ``"sampled"`` after the last step, both on held-out problems."""
    return run[what][-1]


def gain(run: Record, what: str) -> float:
    """At the end less that of the start."""
    return run[what][-1] - run[what][0]


def start_gap(result: Record, start: str, name: str) -> Interval:
    """A figure of a start less that of SFT's, paired by seed."""
    pairs = zip(_starts(result, start), _starts(result, REFERENCE), strict=True)
    return interval([own[name] - reference[name] for own, reference in pairs])


def run_gap(
    result: Record, arm: str, start: str, value: Callable[[Record, str], float], what: str
) -> Interval:
    """A value of the runs from a start less that of those from SFT's, paired by seed."""
    pairs = zip(_runs(result, arm, start), _runs(result, arm, REFERENCE), strict=True)
    return interval([value(own, what) - value(reference, what) for own, reference in pairs])


def mean_gain_gap(result: Record, start: str, what: str) -> Interval:
    """As :func:`run_gap` of the gain, mean over the arms of each seed."""
    return _mean_gap(
        [(_runs(result, a, start), _runs(result, a, REFERENCE)) for a in ARMS], gain, what
    )


def over_control(result: Record, arm: str, what: str) -> Interval:
    """Gain of an arm less that of the control, mean over the starts of each seed."""
    return _mean_gap(
        [(_runs(result, arm, m), _runs(result, CONTROL, m)) for m in METHODS], gain, what
    )


def gvm_gap(result: Record, starts: Sequence[str], what: str) -> Interval:
    """GVM-RAFT++ at the end less uniform RAFT++, mean over ``starts`` of each seed."""
    return _mean_gap(
        [(_runs(result, GVM, s), _runs(result, UNIFORM, s)) for s in starts], end, what
    )


def _mean_gap(
    pairs: Sequence[tuple[list[Record], list[Record]]],
    value: Callable[[Record, str], float],
    what: str,
) -> Interval:
    """Of pairs of runs, each one a seed."""
    gaps = [
        [value(own, what) - value(other, what) for own, other in zip(*pair, strict=True)]
        for pair in pairs
    ]
    return interval([mean(of_seed) for of_seed in zip(*gaps, strict=True)])


def sharpness_correlation(result: Record, arm: str, what: str) -> float:
    """Pearson correlation of a start's entropy with the gain, both less their mean in the seed."""
    entropies, gains = (
        torch.tensor(values, dtype=torch.float64)  # [methods, seeds]
        for values in (
            [[start["entropy"] for start in _starts(result, m)] for m in METHODS],
            [[gain(run, what) for run in _runs(result, arm, m)] for m in METHODS],
        )
    )
    return pearson(*((x - x.mean(0)).flatten() for x in (entropies, gains)))


# ---- the CSV and the tables ----


def records(result: Record) -> list[Record]:
    """A row for each evaluation of each run.

    ``accept_rate``: of the iteration before it, on its prompts; none at the start. ``sampled``: on
    held-out problems, at the start and the end.
    """
    return [
        {
            "seed": run["seed"],
            "start": run["start"],
            "arm": run["arm"],
            "rollouts": run["rollouts"][place],
            "steps": run["steps"][place],
            "accuracy": accuracy,
            "sampled": dict(zip((0, len(run["accuracy"]) - 1), run["sampled"], strict=True)).get(
                place
            ),
            "accept_rate": run["accept_rate"][place - 1] if place else None,
            **{f"start_{name}": start[name] for name in FIGURES},
        }
        for run in result["runs"]
        if run["arm"] in ARMS
        for start in _starts(result, run["start"])
        if start["seed"] == run["seed"]
        for place, accuracy in enumerate(run["accuracy"])
    ]


FIGURES = ("greedy", "sampled", "never", "always", "entropy", "distinct", "loss")


def tables(result: Record) -> list[Table]:
    return [_starts_table(result), _runs_table(result), _gvm_table(result)]


def _starts_table(result: Record) -> Table:
    rows = []
    for start in (BASE, *METHODS):
        cells = [_percent(_figure(result, start, name)) for name in FIGURES[:4]]
        for place in (0, 2):  # where a difference to SFT follows
            gap = start_gap(result, start, FIGURES[place // 2])
            other = start not in (BASE, REFERENCE)
            cells.insert(place + 1, _percent(gap, signed=True) if other else "")
        cells += [_figure(result, start, name).text(3) for name in ("entropy", "loss")]
        cells.append(_percent(_figure(result, start, "distinct")))
        rows.append([NAMES[start], *cells])
    return Table(
        "Starts",
        (
            *("start", "greedy, held out, %", "minus SFT", "sampled, %", "minus SFT"),
            *("never, %", "always, %", "entropy", "held-out loss", "distinct, %"),
        ),
        rows,
        note="Sampled: accept rate at temperature 1 on held-out problems; never, always: problems "
        "with no or only accepted responses. Entropy of the next token in these "
        "responses and the loss in nats a token; distinct: different responses to a problem over "
        "all of its. Differences are paired by seed.",
    )


def _runs_table(result: Record) -> Table:
    rows = []
    for arm in (*ARMS, CONTROL):
        for start in METHODS:
            runs, other = _runs(result, arm, start), start != REFERENCE
            cells = []
            for what in GREEDY, SAMPLED:
                gaps = [run_gap(result, arm, start, value, what) for value in (end, gain)]
                cells += [
                    _percent(interval([end(run, what) for run in runs])),
                    _percent(gaps[0], signed=True) if other else "",
                    _percent(interval([gain(run, what) for run in runs]), signed=True),
                    _percent(gaps[1], signed=True) if other else "",
                ]
            sharpness = interval([run["end"]["entropy"] for run in runs]).text(3)
            rows.append([arm, NAMES[start], *cells, sharpness])
    four = ("minus SFT", "gain", "minus SFT")
    return Table(
        "Reinforcement learning: held-out accuracy at the end",
        ("arm", "start", "greedy, %", *four, "sampled, %", *four, "entropy"),
        rows,
        text=2,
        note="Differences are paired by seed. More SFT: as many optimizer steps of plain "
        f"supervision, at the learning rate of {UNIFORM}.",
    )


def _gvm_table(result: Record) -> Table:
    rows = [
        [name, *(_percent(gvm_gap(result, starts, w), signed=True) for w in (GREEDY, SAMPLED))]
        for name, starts in (
            *((NAMES[m], [m]) for m in METHODS),
            ("mean of the starts", METHODS),
        )
    ]
    return Table(f"{GVM} at the end, minus {UNIFORM}, points", ("start", "greedy", "sampled"), rows)


def _figure(result: Record, start: str, name: str) -> Interval:
    return interval([record[name] for record in _starts(result, start)])


def _percent(value: Interval, *, signed: bool = False) -> str:
    scaled = Interval(100 * value.mean, 100 * value.low, 100 * value.high, value.n)
    return ("+" if signed and scaled.mean > 0 else "") + scaled.text(1)


# ---- the reading ----


def reading(result: Record) -> list[str]:
    reference = NAMES[REFERENCE]
    base, own = (
        [_percent(_figure(result, start, name)) for name in ("greedy", "sampled")]
        for start in (BASE, REFERENCE)
    )
    return [
        f"Of the held-out problems the base models solve {base[0]}% greedily and {base[1]}% when "
        f"sampled; after {reference} it is {own[0]}% and {own[1]}%.",
        *(_start_line(result, start) for start in METHODS[1:]),
        *(_arm_line(result, arm) for arm in ARMS),
        _control_line(result),
        _sharpness_line(result),
        f"{GVM} ends {_points(gvm_gap(result, METHODS, GREEDY))} greedily and "
        f"{_points(gvm_gap(result, METHODS, SAMPLED))} sampled from {UNIFORM} with uniform "
        "samples, on average over the starts.",
    ]


def _start_line(result: Record, start: str) -> str:
    greedy, sampled, never, entropy = (
        start_gap(result, start, name) for name in ("greedy", "sampled", "never", "entropy")
    )
    return (
        f"{NAMES[start]}'s start against {NAMES[REFERENCE]}'s: greedy {_points(greedy)}, sampled "
        f"{_points(sampled)}, problems never solved {_points(never)}, entropy "
        f"{'+' if entropy.mean > 0 else ''}{entropy.text(3)} nats a token ({verdict(entropy)})."
    )


def _arm_line(result: Record, arm: str) -> str:
    runs = _runs(result, arm, REFERENCE)
    ends, gains = (
        [
            _percent(interval([value(run, what) for run in runs]), signed=value is gain)
            for what in (GREEDY, SAMPLED)
        ]
        for value in (end, gain)
    )
    others = "; ".join(
        f"{NAMES[start]}'s ends {_points(run_gap(result, arm, start, end, GREEDY))} from that "
        f"greedily, with a gain of {_points(run_gap(result, arm, start, gain, GREEDY))} against "
        f"{NAMES[REFERENCE]}'s, and {_points(run_gap(result, arm, start, end, SAMPLED))} sampled"
        for start in METHODS[1:]
    )
    return (
        f"{arm} takes {NAMES[REFERENCE]}'s start to {ends[0]}% greedily ({gains[0]} points) and "
        f"{ends[1]}% sampled ({gains[1]}); {others}."
    )


def _control_line(result: Record) -> str:
    runs = [run for m in METHODS for run in _runs(result, CONTROL, m)]
    gains = [f"{100 * mean(gain(run, what) for run in runs):+.1f}" for what in (GREEDY, SAMPLED)]
    over = ", ".join(
        f"{arm} {_points(over_control(result, arm, GREEDY))} greedily and "
        f"{_points(over_control(result, arm, SAMPLED))} sampled"
        for arm in ARMS
    )
    return (
        f"As many steps of plain supervision at {UNIFORM}'s learning rate gain {gains[0]} points "
        f"greedily and {gains[1]} sampled, on average over the starts; above that, {over}."
    )


def _sharpness_line(result: Record) -> str:
    entropies = {m: _figure(result, m, "entropy").mean for m in METHODS}
    ordered = sorted(METHODS, key=lambda m: entropies[m])
    lines = []
    for start, word in ((ordered[0], "sharpest"), (ordered[-1], "least sharp")):
        line = f"The {word} start is {NAMES[start]}'s ({entropies[start]:.3f} nats a token"
        if start == REFERENCE:
            lines.append(f"{line}).")
            continue
        gaps = [mean_gain_gap(result, start, what) for what in (GREEDY, SAMPLED)]
        lines.append(
            f"{line} against {entropies[REFERENCE]:.3f} after {NAMES[REFERENCE]}); its gain over "
            f"the {len(ARMS)} arms, against {NAMES[REFERENCE]}'s, is {_points(gaps[0])} greedily, "
            f"so {_left(gaps[0])}, and {_points(gaps[1])} sampled, so {_left(gaps[1])}."
        )
    known = [
        (arm, [sharpness_correlation(result, arm, what) for what in (GREEDY, SAMPLED)])
        for arm in ARMS
    ]
    listed = ", ".join(
        f"{r[0]:.2f} and {r[1]:.2f} with {arm}" for arm, r in known if not any(map(math.isnan, r))
    )
    if listed:
        count = len(_runs(result, ARMS[0], REFERENCE)) * len(METHODS)
        lines.append(
            "Within seeds, the correlation of a start's entropy with the gain, greedy and sampled, "
            f"is {listed} ({count} runs each)."
        )
    return " ".join(lines)


def _left(gap: Interval) -> str:
    return {
        "lower": "it gains less",
        "higher": "it gains more",
    }.get(verdict(gap), "whether it gains less is not settled")


def _points(value: Interval) -> str:
    return f"{_percent(value, signed=True)} points ({verdict(value)})"


def verdict(gap: Interval) -> str:
    """Whether the interval of a difference leaves out 0."""
    if gap.low > 0:
        return "higher"
    return "lower" if gap.high < 0 else "no clear difference"


# ---- the plot ----


def plot(result: Record, path: Path) -> None:
    with figure(path, 2, 3, size=(14, 9)) as (drawn_on, axes):
        for place, arm in enumerate(ARMS):
            _plot_accuracy(axes[0, place], result, arm)
            if place:
                axes[0, place].sharey(axes[0, 0])
        _plot_starts(axes[1, 0], result)
        _plot_gains(axes[1, 1], result)
        _plot_sharpness(axes[1, 2], result)
        handles = [
            axes[0, 0].plot([], [], color=PAINT[start], marker="o", ms=5)[0]
            for start in (BASE, *METHODS)
        ]
        labels = [NAMES[start] for start in (BASE, *METHODS)]
        drawn_on.suptitle(_headline(result))
        drawn_on.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def _headline(result: Record) -> str:
    gaps = []
    for start in METHODS[1:]:
        pairs = [(_runs(result, a, start), _runs(result, a, REFERENCE)) for a in ARMS]
        gap = _mean_gap(pairs, end, GREEDY)
        clear = "" if gap.low > 0 or gap.high < 0 else ", not clear"
        gaps.append(f"{NAMES[start]}'s {_percent(gap, signed=True)} points{clear}")
    return (
        f"After reinforcement learning, against {NAMES[REFERENCE]}'s start: {'; '.join(gaps)}\n"
        "(mean of the arms; bars are 95% intervals over seeds, above with each seed's own level "
        "taken out)"
    )


def _plot_accuracy(axes: Any, result: Record, arm: str) -> None:
    """Means over seeds; the intervals are of what remains when the seeds' own levels are out."""
    runs = {start: _runs(result, arm, start) for start in METHODS}
    levels = [
        mean(value for run in of_seed for value in run["accuracy"])
        for of_seed in zip(*runs.values(), strict=True)
    ]
    shift = max(run["rollouts"][-1] for of in runs.values() for run in of) / 100
    for place, (start, own) in enumerate(runs.items()):
        left = [
            interval([run["accuracy"][i] - level for run, level in zip(own, levels, strict=True)])
            for i in range(len(own[0]["accuracy"]))
        ]
        rollouts = [mean(values) for values in zip(*(run["rollouts"] for run in own), strict=True)]
        axes.errorbar(
            [x + (place - 1) * shift for x in rollouts],
            [value.mean + mean(levels) for value in left],
            yerr=_halves(left),
            color=PAINT[start],
            marker="o",
            ms=4,
            lw=1.6,
            elinewidth=0.9,
            capsize=2,
        )
    gains = ", ".join(
        f"{NAMES[m]} {100 * mean(gain(run, GREEDY) for run in runs[m]):+.1f}" for m in METHODS
    )
    axes.set_title(f"{arm}: gain in points\n{gains}")
    axes.set(xlabel="rollouts", ylabel="held-out accuracy, greedy" if arm == ARMS[0] else "")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _halves(values: Sequence[Interval]) -> list[float] | None:
    """Half-widths for error bars; none for a single seed."""
    return None if any(math.isnan(v.half) for v in values) else [v.half for v in values]


def _plot_starts(axes: Any, result: Record) -> None:
    shown = {
        "greedy": "greedy,\nheld out",
        "sampled": "sampled,\naccepted",
        "never": "problems\nnever solved",
        "distinct": "distinct\nresponses",
    }
    starts = (BASE, *METHODS)
    for group, name in enumerate(shown):
        for place, start in enumerate(starts):
            x = group + (place - (len(starts) - 1) / 2) * 0.2
            values = [record[name] for record in _starts(result, start)]
            axes.bar(x, mean(values), 0.18, color=PAINT[start], alpha=0.85)
            axes.plot([x] * len(values), values, "_", color="#222222", ms=6)
    axes.set_xticks(range(len(shown)), list(shown.values()))
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(title="The starts (lines: seeds)", ylabel="share")


def _plot_gains(axes: Any, result: Record) -> None:
    shown = (*ARMS, CONTROL)
    for group, arm in enumerate(shown):
        for place, start in enumerate(METHODS):
            x = group + (place - (len(METHODS) - 1) / 2) * 0.2
            gains = [100 * gain(run, GREEDY) for run in _runs(result, arm, start)]
            value = interval(gains)
            axes.plot([x] * len(gains), gains, "_", color=PAINT[start], ms=10)
            axes.errorbar(
                x, value.mean, yerr=_halves([value]), fmt="o", color=PAINT[start], capsize=3
            )
    axes.axhline(0, color="#333333", lw=1)
    axes.set_xticks(range(len(shown)), shown)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("points, end minus start")
    axes.set_title("Gain, greedy (lines: seeds)")


MARKERS = dict(zip(ARMS, ("o", "s", "^"), strict=True))


def _plot_sharpness(axes: Any, result: Record) -> None:
    for arm, marker in MARKERS.items():
        for start in METHODS:
            x = [record["entropy"] for record in _starts(result, start)]
            y = [100 * gain(run, SAMPLED) for run in _runs(result, arm, start)]
            axes.plot(x, y, marker, color=PAINT[start], ms=6, alpha=0.85)
        axes.plot([], [], marker, color="#8a8f98", label=arm)
    axes.axhline(0, color="#333333", lw=1)
    axes.legend(fontsize=8)
    axes.set(xlabel="entropy of the start, nats a token", ylabel="points, end minus start")
    axes.set_title("Gain, sampled, against the sharpness of the start")
