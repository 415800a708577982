"""How well utilities against an affordable direction estimate those against the population's."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcore_train.directions import Direction, EmaDirection, descent_direction, norm_of
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import (
    Batch,
    Context,
    Row,
    Setting,
    Start,
    batches,
    collate,
    drawn,
    supervised,
    train_step,
)
from vcore_train.experiments.statistics import interval, pearson, spearman, within
from vcore_train.modeling import IGNORE_INDEX, trainable_parameters
from vcore_train.optimizer_moments import preconditioned
from vcore_train.utilities import token_utilities


@dataclass(frozen=True)
class Scale(Setting):
    """``averaged``: sequences in the population's direction; ``batch``: what shares are taken of.

    ``followed``: steps of training over which running averages follow the parameters.
    """

    averaged: int = 512
    batch: int = 128
    redraws: int = 4
    followed: int = 40
    streams: int = 2


FULL = Scale()
QUICK = Scale(
    **{
        **vars(Setting.quick(train_steps=8, rows=128)),
        **{"averaged": 24, "batch": 16, "redraws": 2, "followed": 3},
    }
)

SHARES = (0.02, 0.1, 0.5, 1.0)
DECAYS = (0.5, 0.8, 0.9, 0.95)
REFRESHED = (1, 4)  # steps between updates of a running average
CHUNK = 16  # sequences in a forward pass


def measure(context: Context) -> dict[str, Any]:
    """``{"directions": one record a seed and kind of direction, "ceiling": one a seed}``.

    Training goes on from the start for ``followed`` steps of plain supervision, in which the
    running averages and the optimizer gather their state; everything is judged at the last step.
    """
    scale = context.setting
    assert isinstance(scale, Scale)
    records, ceilings = [], []
    for seed in context.seeds:
        start = context.start(seed)
        rows = drawn(start.held_in, len(start.held_in), 1000 + seed)
        judged, rest = collate(rows[:CHUNK]), rows[CHUNK:]
        population, pool = rest[: scale.averaged], rest[scale.averaged :]
        averages = _follow(context, start, pool, seed)
        halves = [population[part::2] for part in range(2)]
        gradients = [_mean_gradient(start, half) for half in halves]
        truth = _Truth(start, judged, _together(gradients, halves))
        one, other = (truth.utilities(gradient) for gradient in gradients)
        ceilings.append({"seed": seed, "halves": pearson(one[truth.mask], other[truth.mask])})

        for share in SHARES:
            size = max(1, round(share * scale.batch))
            draws = [
                _mean_gradient(start, drawn(pool, size, 7919 * seed + 31 * draw + size))
                for draw in context.track(range(scale.redraws), f"Probes of {size}, seed {seed}")
            ]
            records.append({"seed": seed, "kind": "probe", "size": size, **truth.judge(draws)})
        for (decay, every), streams in averages.items():
            drawn_ones = [stream.direction() for stream in streams]
            records.append(
                {
                    "seed": seed,
                    "kind": "ema",
                    "decay": decay,
                    "every": every,
                    "size": CHUNK * (1 + decay) / (1 - decay),
                    **truth.judge(drawn_ones),
                }
            )
        for kind in ("momentum", "adam"):
            direction = descent_direction(
                start.model,
                judged,
                kind=kind,  # type: ignore[arg-type]
                optimizer=start.optimizer,
            )
            beta = start.optimizer.param_groups[0]["betas"][0]
            size = scale.batch_size * (1 + beta) / (1 - beta)
            records.append({"seed": seed, "kind": kind, "size": size, **truth.judge([direction])})
    return {"directions": records, "ceiling": ceilings, "averaged": scale.averaged}


def _follow(
    context: Context, start: Start, pool: Sequence[Row], seed: int
) -> dict[tuple[float, int], list[EmaDirection]]:
    """Trains on; running averages of fresh probes, from independent streams of rows."""
    scale = context.setting
    assert isinstance(scale, Scale)
    averages = {
        (decay, every): [EmaDirection(decay) for _ in range(scale.streams)]
        for decay in DECAYS
        for every in REFRESHED
    }
    for step in context.track(range(scale.followed), f"Following, seed {seed}"):
        key = (seed * scale.followed + step) * (scale.streams + 1)
        for stream in range(scale.streams):
            gradient = _mean_gradient(start, drawn(pool, CHUNK, key + 1 + stream))
            for (_, every), members in averages.items():
                if (scale.followed - 1 - step) % every == 0:  # the last step refreshes all
                    members[stream].update(gradient)
        if step + 1 < scale.followed:  # so that the newest gradient is at the judged parameters
            batch = collate(drawn(start.held_in, scale.batch_size, 104729 + key))
            train_step(start.model, start.optimizer, batch)
    return averages


def _mean_gradient(start: Start, rows: Sequence[Row]) -> Direction:
    return descent_direction(start.model, batches(rows, CHUNK), kind="probe")


def _together(gradients: Sequence[Direction], parts: Sequence[Sequence[Row]]) -> Direction:
    """The mean gradient over all tokens of ``parts`` from those of each part."""
    counts = [
        sum(label != IGNORE_INDEX for row in part for label in row["labels"]) for part in parts
    ]
    shares = [count / sum(counts) for count in counts]
    return {
        name: torch.stack([s * g[name] for s, g in zip(shares, gradients, strict=True)]).sum(0)
        for name in gradients[0]
    }


class _Truth:
    """Utilities of one batch against the population's direction, and others held against them."""

    def __init__(self, start: Start, batch: Batch, reference: Direction):
        self.start, self.batch, self.reference = start, batch, reference
        self.mask = supervised(batch)
        self.truth = self.utilities(reference)
        parameters = trainable_parameters(start.model)
        self.preconditioned = self.utilities(preconditioned(reference, parameters, start.optimizer))

    def utilities(self, direction: Direction) -> Tensor:
        return token_utilities(self.start.model, self.batch, direction)

    def judge(self, draws: Sequence[Direction]) -> dict[str, Any]:
        """Means over the draws; ``noise``: variance over draws / variance over tokens.

        The noise is NaN for a single draw.
        """
        utilities = [self.utilities(direction) for direction in draws]
        each: dict[str, list[float]] = {}
        for utility, direction in zip(utilities, draws, strict=True):
            pair = utility[self.mask], self.truth[self.mask]
            inside = within(pearson, utility, self.truth, self.mask)
            for name, value in (
                ("pearson", pearson(*pair)),
                ("spearman", spearman(*pair)),
                ("within_pearson_median", float(inside.median())),
                ("within_pearson_mean", float(inside.mean())),
                ("preconditioned", pearson(pair[0], self.preconditioned[self.mask])),
                ("cosine", _cosine(direction, self.reference)),
            ):
                each.setdefault(name, []).append(value)
        stacked = torch.stack([u[self.mask] for u in utilities]).double()
        noise = float("nan")
        if len(draws) > 1:
            signal = self.truth[self.mask].double().var()
            noise = float(stacked.var(0).mean() / signal)
        means = {name: sum(values) / len(values) for name, values in each.items()}
        return {**means, "noise": noise, "draws": len(draws)}


def _cosine(a: Direction, b: Direction) -> float:
    product = sum(float((a[name].double() * b[name].double()).sum()) for name in a)
    return product / (norm_of(a.values()) * norm_of(b.values()))


# ---- what is shown ----


def _kinds(result: dict[str, Any]) -> list[tuple[str, dict[str, Any], float]]:
    """Label, the properties that pick its records, sequences averaged."""
    found: dict[str, tuple[str, dict[str, Any], float]] = {}
    for record in result["directions"]:
        keys = {k: record[k] for k in ("kind", "decay", "every") if k in record}
        if record["kind"] == "probe":
            keys["size"] = record["size"]
            label = f"fresh probe of {record['size']}"
        elif record["kind"] == "ema":
            label = f"running average, decay {record['decay']}"
            label += "" if record["every"] == 1 else f", every {record['every']} steps"
        else:
            label = {"momentum": "Adam's momentum", "adam": "Adam's step"}[record["kind"]]
        found[label] = (label, keys, record["size"])
    return list(found.values())


def _values(result: dict[str, Any], name: str, keys: dict[str, Any]) -> list[float]:
    return [
        record[name]
        for record in result["directions"]
        if all(record.get(key) == value for key, value in keys.items())
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        [
            label,
            f"{size:.0f}",
            *(
                interval(_values(result, name, keys)).text()
                for name in (
                    *("pearson", "spearman", "within_pearson_median", "cosine"),
                    "preconditioned",
                )
            ),
            _noise(result, keys),
        ]
        for label, keys, size in _kinds(result)
    ]
    ceiling = interval([c["halves"] for c in result["ceiling"]])
    return [
        Table(
            f"Utilities against those of a direction averaged over {result['averaged']} sequences",
            [
                *("direction", "sequences", "Pearson", "rank", "within: Pearson", "cosine of g"),
                *("r, preconditioned", "noise / signal"),
            ],
            rows,
            note="sequences: how many the direction averages; for a running average with decay d, "
            f"those of one probe ({CHUNK}) times (1 + d) / (1 - d). r, preconditioned: Pearson "
            "correlation with the utilities against the reference divided by the root of Adam's "
            "second moment. noise / signal: variance of a "
            "token's utility over redraws of the probe, divided by the variance of the reference "
            "over tokens. Two halves of the reference agree to r = "
            f"{ceiling.text()}.",
        )
    ]


def _noise(result: dict[str, Any], keys: dict[str, Any]) -> str:
    values = _values(result, "noise", keys)
    return "" if any(v is None or v != v for v in values) else interval(values).text()


COLOURS = {"probe": "#3b6fb6", 1: "#c8452f", 4: "#c98a1b", "momentum": "#2a9d6f", "adam": "#8a8f98"}


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, 1, 2, size=(10.5, 4.2), width_ratios=(1.3, 1)) as (_, (left, right)):
        for key, label in (
            ("probe", "fresh probe"),
            (1, "running average, every step"),
            (4, "running average, every 4th step"),
            ("momentum", "Adam's momentum"),
            ("adam", "Adam's step"),
        ):
            points = [
                (size, interval(_values(result, "pearson", keys)), keys)
                for _, keys, size in _kinds(result)
                if key in (keys["kind"], keys.get("every"))
            ]
            apart = {1: 0.97, 4: 1.03, "momentum": 0.92, "adam": 1.09}.get(key, 1.0)
            sizes = [size * apart for size, _, _ in points]
            left.errorbar(
                sizes,
                [found.mean for _, found, _ in points],
                [found.half for _, found, _ in points],
                color=COLOURS[key],
                marker="o" if len(points) > 1 else "D",
                capsize=2,
                linewidth=1.6,
                label=label,
            )
            noises = [interval(_values(result, "noise", keys)).mean for _, _, keys in points]
            if not any(noise != noise for noise in noises):
                right.plot(sizes, noises, color=COLOURS[key], marker="o", label=label)
        ceiling = interval([c["halves"] for c in result["ceiling"]]).mean
        left.axhline(ceiling, color="#555555", linestyle=":", linewidth=1.2)
        left.axhline(0, color="#555555", linewidth=0.8)
        left.text(left.get_xlim()[0], ceiling, " two halves of the reference", va="bottom", size=8)
        left.set(
            xscale="log",
            ylim=(-1.05, 1.1),
            xlabel="sequences that the direction averages",
            ylabel="r with the population's utilities",
            title="What a direction is worth",
        )
        left.legend(fontsize=8, loc="lower left")
        right.set(
            xscale="log",
            yscale="log",
            xlabel="sequences that the direction averages",
            ylabel="noise / signal",
            title="How much utilities change with the draw",
        )
        right.axhline(1, color="#555555", linestyle=":", linewidth=1.2)
