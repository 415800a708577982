"""What one step gains from the weights, for every direction, KL budget and scope.

Along a run of plain AdamW training, at intervals, a batch is weighted in many ways. Each reweighted
gradient is compared with a held-out estimate of the population gradient, and some are followed by
one real step of SGD and of AdamW.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn

from vcore_kernels import gibbs_weights
from vcore_kernels.perturbed import perturbed
from vcore_train.directions import EmaDirection, descent_direction, uniform_gradient
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import (
    Batch,
    Context,
    Setting,
    batches,
    drawn,
    endless,
    train_step,
)
from vcore_train.experiments.statistics import interval
from vcore_train.modeling import token_nll, trainable_parameters
from vcore_train.supervised import SupervisedTokens
from vcore_train.utilities import token_utilities

KL_BUDGETS = (0.005, 0.02, 0.1, 0.5, 2.0)  # nats
KL_SCOPES = ("trajectory", "batch")
AVERAGES = {  # name: (decay, steps between updates)
    "ema 0.5": (0.5, 1),
    "ema 0.9": (0.9, 1),
    "ema 0.9/8": (0.9, 8),
}
DIRECTIONS = {  # name: label
    "average": "average at these parameters",
    "probe": "fresh probe",
    "ema 0.5": "EMA 0.5, every step",
    "ema 0.9": "EMA 0.9, every step",
    "ema 0.9/8": "EMA 0.9, every 8 steps",
    "momentum": "momentum",
}
PRECONDITIONED = ("average", "probe")  # directions also taken after AdamW's preconditioner
STEPPED = ("average", "probe", "ema 0.9")  # directions whose steps are taken, in every trajectory
OPTIMIZERS = ("sgd", "adamw")
SIZES = {"whole": 1.0, "tenth": 0.1}  # of the step that uniform weights would take
SGD_LR = 0.1
COLOURS = ("#c8452f", "#3b6fb6", "#8d5fb0", "#2a9d6f", "#5bb8c4", "#c98a1b")  # one a direction


@dataclass(frozen=True)
class DescentSetting(Setting):
    """``batches`` are measured a seed, one every ``spacing`` steps after ``lead`` steps.

    ``population``: held-out rows of the population gradient, and training rows of the averaged
    direction. ``judged``: further held-out rows, on which the loss after a step is measured.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 2
    length: int = 192
    lr: float = 3e-3
    held_out: int = 1319
    batches: int = 4
    lead: int = 50
    spacing: int = 13
    population: int = 256
    judged: int = 64
    run_lr: float = 3e-4


FULL = DescentSetting.full()
QUICK = DescentSetting.quick(
    layers=1, hidden=32, batches=2, lead=8, spacing=2, population=16, judged=8
)


class Way(NamedTuple):
    """One way to weigh a batch."""

    weights: str  # uniform, dft, iw_sft, vcore, shuffled
    direction: str = ""
    preconditioned: bool = False
    kl: float = 0.0
    scope: str = ""


SHUFFLED = Way("shuffled", "average", False, 0.1, "trajectory")


def measure(context: Context) -> dict[str, Any]:
    """``{"ways": one record a way, with every figure's mean a seed and over all batches}``."""
    figures: dict[Way, list[dict[str, float]]] = defaultdict(list)
    for seed in context.seeds:
        for found in _points(context, seed):
            for way, values in found.items():
                figures[way].append({"seed": seed, **values})
    uniform = figures[Way("uniform")]
    return {
        "batches": len(uniform),
        "ways": [{**way._asdict(), **_summary(v, uniform)} for way, v in figures.items()],
    }


def _points(context: Context, seed: int) -> Iterator[dict[Way, dict[str, float]]]:
    """The figures of every way at one measured batch after the other."""
    setting: Any = context.setting
    start = context.start(seed)
    model, optimizer = start.model, start.optimizer
    for group in optimizer.param_groups:
        group["lr"] = setting.run_lr
    reference = copy.deepcopy(model)
    size, rows = setting.batch_size, start.held_in
    order, probes = endless(rows, size), endless(drawn(rows, len(rows), 1000 + seed), size)
    held_out = drawn(start.held_out, setting.population + setting.judged, seed)
    population = batches(held_out[: setting.population], size)
    judged = batches(held_out[setting.population :], 4 * size)
    averages = {name: EmaDirection(decay) for name, (decay, _) in AVERAGES.items()}
    total = setting.lead + setting.spacing * setting.batches
    for step in context.track(range(total), f"Steps, seed {seed}"):
        batch = next(order)
        gradient = uniform_gradient(model, next(probes))
        for name, (_, every) in AVERAGES.items():
            if step % every == 0:
                averages[name].update(gradient)
        if step >= setting.lead and (step - setting.lead) % setting.spacing == 0:
            directions = {
                "probe": descent_direction(model, next(probes)),
                **{name: average.direction() for name, average in averages.items()},
                "average": uniform_gradient(
                    model, batches(drawn(rows, setting.population, 7 * step + seed), size)
                ),
                "momentum": descent_direction(model, [], kind="momentum", optimizer=optimizer),
            }
            yield Point(
                model, optimizer, reference, batch, uniform_gradient(model, population), judged
            ).figures(directions, step)
        train_step(model, optimizer, batch)


class Point:
    """A model at one step of its run, and a batch to be weighted there."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        reference: nn.Module,
        batch: Batch,
        population: dict[str, Tensor],
        judged: Sequence[Batch],
    ):
        self.model, self.optimizer, self.batch, self.judged = model, optimizer, batch, judged
        self.parameters = trainable_parameters(model)
        self.population = population
        self.tokens = SupervisedTokens.of([batch])
        self.lengths = self.tokens.cu_seqlens.diff().long()
        self.rates = {name: _rate(optimizer, p) for name, p in self.parameters.items()}
        with torch.no_grad():
            self.nll = self.tokens.packed([token_nll(model, batch)])
            self.shift = self.tokens.packed([token_nll(reference, batch)]) - self.nll
        self.before = self._judge()

    def figures(
        self, directions: dict[str, dict[str, Tensor]], seed: int
    ) -> dict[Way, dict[str, float]]:
        gradient = self.gradient(torch.ones_like(self.nll))
        self.sizes = {name: norm for name, _, norm in self.steps(gradient)}
        ways = {Way("uniform"): self._figures(gradient, steps=True)}
        for way, weights in (
            (Way("dft"), torch.exp(-self.nll)),
            (Way("iw_sft"), self._per_token(self._means(self.shift).exp().clamp(max=16))),
        ):
            ways[way] = self._figures(self.gradient(weights), steps=True)
        generator = torch.Generator().manual_seed(seed)
        for name in DIRECTIONS:
            direction = directions[name]
            for preconditioned in (False, True)[: 1 + (name in PRECONDITIONED)]:
                taken = (
                    {n: g * self.rates[n] for n, g in direction.items()}
                    if preconditioned
                    else direction
                )
                utility = self.tokens.packed([token_utilities(self.model, self.batch, taken)])
                for scope in KL_SCOPES:
                    for kl in KL_BUDGETS:
                        weights = self.gibbs(utility, kl, scope)
                        way = Way("vcore", name, preconditioned, kl, scope)
                        steps = name in STEPPED and not preconditioned and scope == "trajectory"
                        ways[way] = self._figures(self.gradient(weights), steps=steps)
                if name == "average" and not preconditioned:
                    weights = self.gibbs(utility, SHUFFLED.kl, SHUFFLED.scope)
                    gradient = self.gradient(self.shuffled(weights, generator))
                    ways[SHUFFLED] = self._figures(gradient, steps=True)
        return ways

    def gibbs(self, utility: Tensor, kl: float, scope: Any) -> Tensor:
        cu_seqlens = self.tokens.cu_seqlens
        q = gibbs_weights(utility, cu_seqlens=cu_seqlens, kl_budget=kl, kl_scope=scope).q
        return q * self._per_token(self.lengths)

    def _per_token(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.lengths)

    def _means(self, values: Tensor) -> Tensor:
        return torch.stack([part.mean() for part in values.split(self.lengths.tolist())])

    def shuffled(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        """The same weights in a random order within each trajectory."""
        parts = weights.split(self.lengths.tolist())
        return torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts])

    def gradient(self, weights: Tensor) -> dict[str, Tensor]:
        nll = token_nll(self.model, self.batch)
        loss = (nll * self.tokens.unpacked(weights)[0]).sum() / self.tokens.count
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return dict(zip(self.parameters, gradients, strict=True))

    def _figures(self, gradient: dict[str, Tensor], *, steps: bool) -> dict[str, float]:
        found = {
            "cosine": cosine(gradient, self.population),
            "preconditioned_cosine": cosine(
                *({n: g * self.rates[n] for n, g in d.items()} for d in (gradient, self.population))
            ),
        }
        if steps:
            for name, step, norm in self.steps(gradient):
                for size, part in SIZES.items():
                    scale = part * self.sizes[name] / norm
                    with perturbed(list(self.parameters.values()), step, scale):
                        found[f"drop_{name}_{size}"] = self.before - self._judge()
        return found

    def steps(self, gradient: dict[str, Tensor]) -> Iterator[tuple[str, list[Tensor], float]]:
        """The displacement, away from the gradient, of a real step of SGD and AdamW, and its norm.

        Neither the model nor its optimizer moves.
        """
        for name in OPTIMIZERS:
            moved = {key: p.detach().clone().requires_grad_() for key, p in self.parameters.items()}
            optimizer: torch.optim.Optimizer = torch.optim.SGD(moved.values(), lr=SGD_LR)
            if name == "adamw":
                optimizer = torch.optim.AdamW(moved.values())
                optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
            for key, parameter in moved.items():
                parameter.grad = gradient[key]
            optimizer.step()
            step = [(p - moved[key]).detach() for key, p in self.parameters.items()]
            yield name, step, math.sqrt(sum(float(s.square().sum()) for s in step))

    def _judge(self) -> float:
        with torch.no_grad():
            nll = sum(float(token_nll(self.model, batch).sum()) for batch in self.judged)
        return nll / sum(SupervisedTokens.of([batch]).count for batch in self.judged)


@torch.no_grad()
def _rate(optimizer: torch.optim.AdamW, parameter: nn.Parameter) -> Tensor:
    """What AdamW multiplies a gradient by; 0 for entries that it never moved."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    square = state["exp_avg_sq"]
    root = (square / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]
    return torch.where(square == 0, 0.0, 1 / root)


def cosine(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    product = sum(float((x[name] * y[name]).sum()) for name in x)
    norms = [math.sqrt(sum(float(g.square().sum()) for g in d.values())) for d in (x, y)]
    return product / math.prod(norms) if math.prod(norms) > 0 else math.nan


# ---- from the batches to a record, tables and a plot ----


def _summary(
    values: list[dict[str, float]], uniform: list[dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """For every figure: mean over batches, the same as a multiple of uniform's, less uniform's."""
    found = {}
    for name in values[0]:
        if name == "seed":
            continue
        own, base = [v[name] for v in values], [u[name] for u in uniform]
        mean, half = _ratio(own, base)
        gap = interval([a - b for a, b in zip(own, base, strict=True)])
        found[name] = {
            "mean": interval(own).mean,
            "half": interval(own).half,
            "ratio": mean,
            "ratio_half": half,
            "gap": gap.mean,
            "gap_half": gap.half,
            "seeds": [
                interval([v[name] for v in values if v["seed"] == seed]).mean
                for seed in sorted({v["seed"] for v in values})
            ],
        }
    return found


def _ratio(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Ratio of the means of paired values, and the half-width of its 95% interval."""
    ratio = sum(values) / sum(base)
    residuals = interval([v - ratio * b for v, b in zip(values, base, strict=True)])
    return ratio, residuals.half / abs(sum(base) / len(base))


def record_of(result: dict[str, Any], way: Way) -> dict[str, dict[str, Any]]:
    """The figures of one way to weigh."""
    for record in result["ways"]:
        if all(record[name] == value for name, value in way._asdict().items()):
            return record
    raise KeyError(way)


def tables(result: dict[str, Any]) -> list[Table]:
    plain = [
        ("uniform", Way("uniform")),
        ("DFT", Way("dft")),
        ("iw-SFT", Way("iw_sft")),
        (
            f"shuffled weights, KL {SHUFFLED.kl}",
            SHUFFLED,
        ),
    ]
    best = [
        (_label(name, pre), Way("vcore", name, pre, 0.1, "trajectory"))
        for name in DIRECTIONS
        for pre in (False, True)
        if not pre or name in PRECONDITIONED
    ]
    grid = [
        (name, pre, scope)
        for name in DIRECTIONS
        for pre in (False, True)
        for scope in KL_SCOPES
        if not pre or name in PRECONDITIONED
    ]
    drops = _drop_rows(result, plain)
    note = (
        f"Ratios to uniform weights on the same {result['batches']} batches; \u00b1 is the "
        "half-width of a 95% interval over batches."
    )
    return [
        Table(
            "Cosine with the held-out population gradient (VCORE: KL 0.1 a trajectory)",
            ("weights", "cosine", "x uniform", "after Adam's preconditioner", "x uniform"),
            [
                [
                    label,
                    *_cells(record_of(result, way), "cosine"),
                    *_cells(record_of(result, way), "preconditioned_cosine"),
                ]
                for label, way in (*plain, *best)
            ],
            note=note,
        ),
        *(
            Table(
                f"{title} as a multiple of uniform's",
                ("direction", "KL per", *(f"{kl} nats" for kl in KL_BUDGETS)),
                [
                    [
                        _label(name, pre),
                        scope,
                        *(
                            _multiple(record_of(result, Way("vcore", name, pre, kl, scope))[figure])
                            for kl in KL_BUDGETS
                        ),
                    ]
                    for name, pre, scope in grid
                ],
                text=2,
            )
            for figure, title in (
                ("cosine", "Cosine"),
                ("preconditioned_cosine", "Cosine after Adam's preconditioner"),
            )
        ),
        Table(
            "Held-out loss drop of one step less that of uniform weights, in 1e-3 nats",
            ("weights", "optimizer", "step", *(f"{kl} nats" for kl in KL_BUDGETS)),
            [
                [label, optimizer, size, *cells(optimizer, size)]
                for optimizer in OPTIMIZERS
                for size in SIZES
                for label, cells in drops
            ],
            text=3,
            note="Updates have the norm of the uniform step, or a tenth of it. Rows without a "
            "budget stand in the first column; uniform's own drop is not a difference.",
        ),
    ]


def _drop_rows(
    result: dict[str, Any], plain: Sequence[tuple[str, Way]]
) -> list[tuple[str, Callable[[str, str], list[str]]]]:
    """Labels of the last table, and what gives the cells for an optimizer and a size."""

    def one(way: Way, part: str) -> Callable[[str, str], list[str]]:
        def cells(optimizer: str, size: str) -> list[str]:
            figure = record_of(result, way)[f"drop_{optimizer}_{size}"]
            return [_thousandths(figure, part), *[""] * (len(KL_BUDGETS) - 1)]

        return cells

    def many(direction: str) -> Callable[[str, str], list[str]]:
        def cells(optimizer: str, size: str) -> list[str]:
            ways = (Way("vcore", direction, False, kl, "trajectory") for kl in KL_BUDGETS)
            name = f"drop_{optimizer}_{size}"
            return [_thousandths(record_of(result, way)[name], "gap") for way in ways]

        return cells

    first, *others = plain
    return [
        (first[0], one(first[1], "mean")),
        *((label, one(way, "gap")) for label, way in others),
        *((DIRECTIONS[name], many(name)) for name in STEPPED),
    ]


def _thousandths(figure: dict[str, Any], part: str) -> str:
    half = figure["half" if part == "mean" else "gap_half"]
    return f"{1e3 * figure[part]:{'+' if part == 'gap' else ''}.2f} \u00b1 {1e3 * half:.2f}"


def _label(direction: str, preconditioned: bool) -> str:
    return DIRECTIONS[direction] + (", preconditioned" if preconditioned else "")


def _cells(figures: dict[str, dict[str, Any]], name: str) -> list[str]:
    figure = figures[name]
    return [f"{figure['mean']:.3f} \u00b1 {figure['half']:.3f}", _multiple(figure)]


def _multiple(figure: dict[str, Any]) -> str:
    return f"{figure['ratio']:.2f} \u00b1 {figure['ratio_half']:.2f}"


def plot(result: dict[str, Any], path: Path) -> None:
    panels = {
        "cosine": "Cosine with the population gradient",
        "drop_sgd_tenth": "Loss drop, a tenth of an SGD step",
        "drop_sgd_whole": "Loss drop, an SGD step",
        "preconditioned_cosine": "Cosine after Adam's preconditioner",
        "drop_adamw_tenth": "Loss drop, a tenth of an AdamW step",
        "drop_adamw_whole": "Loss drop, an AdamW step",
    }
    colours = dict(zip(DIRECTIONS, COLOURS, strict=False))
    with figure(path, 2, 3, size=(13, 7.4), sharex=True) as (drawn, grid):
        for axes, (name, title) in zip(grid.flat, panels.items(), strict=True):
            cosine = "cosine" in name
            part, unit, level = ("ratio", 1, 1) if cosine else ("gap", 1e3, 0)
            for direction in DIRECTIONS if cosine else STEPPED:
                ways = [Way("vcore", direction, False, kl, "trajectory") for kl in KL_BUDGETS]
                found = [record_of(result, way)[name] for way in ways]
                axes.errorbar(
                    KL_BUDGETS,
                    [unit * figures[part] for figures in found],
                    [unit * figures[f"{part}_half"] for figures in found],
                    color=colours[direction],
                    elinewidth=0.7,
                    marker="o",
                    markersize=3.5,
                )
            for label, way in (("DFT", Way("dft")), ("shuffled", SHUFFLED)):
                value = unit * record_of(result, way)[name][part]
                axes.axhline(value, color="#8a8f98", linewidth=1, linestyle=":")
                place = (KL_BUDGETS[-1], value)
                axes.annotate(label, place, ha="right", va="bottom", color="#5c6068", fontsize=8)
            axes.axhline(level, color="#333333", linewidth=1.2)
            axes.annotate("uniform", (KL_BUDGETS[0], level), va="bottom", fontsize=8)
            axes.set(title=title, xscale="log")
            axes.set_xticks(KL_BUDGETS, [str(kl) for kl in KL_BUDGETS])
            axes.minorticks_off()
            axes.set_ylabel("multiple of uniform's" if cosine else "less uniform's (1e-3 nats)")
        for axes in grid[1]:
            axes.set_xlabel("KL budget a trajectory (nats)")
        lines = [Line2D([], [], color=colours[name], marker="o") for name in DIRECTIONS]
        drawn.legend(lines, DIRECTIONS.values(), loc="outside lower center", ncols=3)
