"""Whole training runs: held-out loss against steps for weighted and plain supervision.

All arms of a seed begin at the same weights with a new optimizer and see the same batches; only
the factor on each token's loss differs (and where said the learning rate).
Directions are taken on the way, by the schedule that the trainer uses, from the data of the run.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isfinite, isnan, nan
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from vcore_kernels import variance_control
from vcore_kernels.perturbed import NonFiniteDirectionError
from vcore_train.config import VcoreConfig
from vcore_train.differences import DifferenceHead
from vcore_train.direction_schedule import DirectionSchedule
from vcore_train.experiments.corruption import corrupt
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import (
    Batch,
    Context,
    Row,
    Setting,
    Start,
    T,
    batches,
    drawn,
    endless,
    supervised,
)
from vcore_train.experiments.statistics import Interval, interval
from vcore_train.experiments.workers import in_workers
from vcore_train.modeling import token_nll, trainable_parameters
from vcore_train.supervised import SupervisedTokens
from vcore_train.utilities import Method, token_utilities_and_nll
from vcore_train.weighting import weigh


@dataclass(frozen=True)
class TrainSetting(Setting):
    """``steps`` of AdamW from the start, the learning rate warmed up and then falling to zero.

    ``judged``: held-out rows of the loss and accuracy, taken every ``judged_every`` steps.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 2
    batch_size: int = 8
    steps: int = 200
    judged: int = 160
    judged_every: int = 40
    run_lr: float = 2e-3


@dataclass(frozen=True)
class RunSetting(TrainSetting):
    """``corrupted``: every so manieth row of the noisy data has ``replaced`` of its solution tokens
    replaced.
    """

    length: int = 160
    held_out: int = 1319
    corrupted: int = 2
    replaced: float = 0.2


FULL = RunSetting.full()
QUICK = RunSetting.quick(layers=1, batch_size=4, train_steps=6, steps=4, judged=8, judged_every=2)


@dataclass(frozen=True)
class Arm:
    """One way to train. ``options``: of :class:`VcoreConfig`; the library's defaults if empty."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False  # the weights of each trajectory in a random order
    lr: float = 1.0  # multiple of the setting's
    head: DifferenceHead = "linear"  # of the utilities by a difference


UNIFORM = Arm("uniform", {"method": "sft"})
EMA = {"direction": "ema", "every": 4}
PROBE = {"direction": "probe", "every": 1}
ARMS = {
    "clean": (
        UNIFORM,
        replace(UNIFORM, name="uniform, twice the learning rate", lr=2.0),
        Arm("EMA, KL 0.1", {**EMA, "kl_budget": 0.1}),
        Arm("EMA, KL 0.02", {**EMA, "kl_budget": 0.02}),
        Arm("fresh probe, KL 0.1", {**PROBE, "kl_budget": 0.1}),
        Arm("fresh probe, KL 0.02", {**PROBE, "kl_budget": 0.02}),
        Arm("fresh probe, KL 0.005", {**PROBE, "kl_budget": 0.005}),
        Arm("shuffled, KL 0.02", {**PROBE, "kl_budget": 0.02}, shuffled=True),
    ),
    "noisy": (
        UNIFORM,
        Arm("fresh probe, KL 0.02", {**PROBE, "kl_budget": 0.02}),
        Arm("DFT", {"method": "dft"}),
    ),
}


@dataclass
class Trained:
    """What one run left behind.

    Where gradients cease to be finite the run ends; what would have been judged later is NaN.
    """

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # held out, nats a token
    accuracy: list[float] = field(default_factory=list)  # held out, next-token
    norms: list[float] = field(default_factory=list)  # of the gradient before clipping, a step
    # Of each weighted step: KL (nats), alpha, V_q / V_u of "utility", tau.
    figures: dict[str, list[float]] = field(default_factory=dict)
    noise: float = 0.0  # half the mean squared difference of consecutive gradients
    step_seconds: float = 0.0  # of CPU time

    @property
    def alpha(self) -> float:
        """Mean over the run, 0 where nothing was weighted."""
        return fmean(self.figures["alpha"]) if self.figures else 0.0


def train(
    start: Start,
    rows: Sequence[Row],
    judged: Sequence[Batch],
    arm: Arm,
    setting: TrainSetting,
    *,
    seed: int,
    optimizer: str = "adamw",
    lr: float | None = None,
    watch: Callable[[int, Any], None] | None = None,
) -> Trained:
    """Trains a copy of the start's model on ``rows`` in the order of the seed.

    ``optimizer``: "adamw" or "sgd". ``lr``: its peak, None the setting's. ``watch``: called with
    the step and the model whenever the loss is judged; it must leave both as they are.
    """
    model = copy.deepcopy(start.model)
    parameters = list(trainable_parameters(model).values())
    peak = arm.lr * (setting.run_lr if lr is None else lr)
    trained: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=peak)
    )
    weigher = _Weigher(arm, rows, setting, seed)
    order = endless(drawn(rows, len(rows), seed), setting.batch_size)
    result = Trained(figures=weigher.figures)
    before: list[Tensor] | None = None
    for step in range(setting.steps):
        if step % setting.judged_every == 0:
            _judge(model, judged, step, result)
            if watch is not None:
                watch(step, model)
        for group in trained.param_groups:
            group["lr"] = peak * min((step + 1) / 10, 1.0) * (1 - step / setting.steps)
        batch = next(order)
        clock = time.process_time()
        try:
            weights = weigher(step, model, trained, batch)
        except NonFiniteDirectionError:
            break
        nll = token_nll(model, batch)
        loss = (nll if weights is None else nll * weights).sum() / supervised(batch).sum()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        result.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        if not isfinite(result.norms[-1]):
            break
        trained.step()
        result.step_seconds += (time.process_time() - clock) / setting.steps
        if before is not None:
            squares = sum(
                float((g - b).square().sum()) for g, b in zip(gradients, before, strict=True)
            )
            result.noise += squares / 2 / max(setting.steps - 1, 1)
        before = list(gradients)
    else:
        _judge(model, judged, setting.steps, result)
        if watch is not None:
            watch(setting.steps, model)
    points = [*range(0, setting.steps, setting.judged_every), setting.steps]
    lost = points[len(result.steps) :]
    result.steps += lost
    result.loss += [nan] * len(lost)
    result.accuracy += [nan] * len(lost)
    return result


class _Weigher:
    """The factor on each token's loss at every step of a run, as the trainer finds it."""

    def __init__(self, arm: Arm, rows: Sequence[Row], setting: TrainSetting, seed: int):
        with tempfile.TemporaryDirectory() as folder:
            self.args = VcoreConfig(output_dir=folder, report_to="none", **arm.options)
        self.arm = arm
        self.figures: dict[str, list[float]] = {}
        self.schedule = DirectionSchedule(self.args)
        self.probes = endless(drawn(rows, len(rows), 1000 + seed), setting.batch_size)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, step: int, model: Any, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> Tensor | None:
        """Like the labels; None is uniform."""
        method = self.args.method
        if method == "sft":
            return None
        if method == "dft":
            with torch.no_grad():
                return torch.exp(-token_nll(model, batch))
        direction = self.schedule.direction(
            step, model, optimizer, lambda count: (next(self.probes) for _ in range(count))
        )
        utility, nll, *_ = token_utilities_and_nll(
            model,
            batch,
            direction,
            method=cast(Method, self.args.utility_method),
            epsilon=self.args.epsilon,
            head=self.arm.head,
            snr=False,
        )
        tokens = SupervisedTokens.of([batch])
        found = weigh(self.args, tokens, [nll], [utility])
        weights = found.weights[0]
        figures = {name: float(found.means[name]) for name in ("kl", "alpha", "tau")}
        figures["ratio"] = variance_ratio(tokens, utility, weights)
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)
        if self.arm.shuffled:
            parts = tokens.packed([weights]).split(tokens.cu_seqlens.diff().tolist())
            mixed = [p[torch.randperm(len(p), generator=self.generator)] for p in parts]
            weights = tokens.unpacked(torch.cat(mixed))[0]
        return weights


def variance_ratio(tokens: SupervisedTokens, utility: Tensor, weights: Tensor) -> float:
    """V_q / V_u of the mode "utility": the variance of q*s over that of s/n.

    ``utility`` and ``weights`` are like the labels of the one batch of ``tokens``; any factor on
    all weights of a trajectory falls out.
    """
    values, q = tokens.packed([utility]), tokens.packed([weights])
    parts = q.split(tokens.cu_seqlens.diff().tolist())
    q = torch.cat([part / part.sum() for part in parts])
    return float(variance_control(values, q, cap=None, cu_seqlens=tokens.cu_seqlens)) ** -2


@torch.no_grad()
def _judge(model: Any, judged: Sequence[Batch], step: int, result: Trained) -> None:
    nll, correct, count = 0.0, 0, 0
    for batch in judged:
        mask = supervised(batch)[:, 1:]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**inputs).logits[:, :-1][mask].float()
        targets = batch["labels"][:, 1:][mask]
        nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        correct += int((logits.argmax(-1) == targets).sum())
        count += len(targets)
    result.steps.append(step)
    result.loss.append(nll / count)
    result.accuracy.append(correct / count)


# ---- runs as jobs ----


class Home(NamedTuple):
    """What a job of another process needs to come by a start: the fields of a Context."""

    setting: TrainSetting
    out: Path
    data: Path | None
    eval_data: Path | None

    @classmethod
    def of(cls, context: Context) -> "Home":
        assert isinstance(context.setting, TrainSetting)
        return cls(context.setting, context.out, context.data, context.eval_data)


@lru_cache(maxsize=2)
def start_at(home: Home, seed: int) -> Start:
    """The start of a seed, the same object for jobs that follow each other; for reading only."""
    data = _data_at(home.out, home.data, home.eval_data)
    return replace(data, setting=home.setting).start(seed)


@lru_cache(maxsize=1)
def _data_at(out: Path, data: Path | None, eval_data: Path | None) -> Context:
    return Context(Setting(), out, data, eval_data)  # shares the rows that it has read


def make_start(home: Home, seed: int) -> None:
    """Trains the start of a seed, unless it is kept from before."""
    start_at(home, seed)


def each(
    context: Context, what: str, function: Callable[..., T], jobs: Sequence[tuple[Any, ...]]
) -> list[T]:
    """``function(*job)`` of each job in order, in worker processes where there are threads."""
    if torch.get_num_threads() > 1:
        return in_workers(context, what, function, jobs)
    return [function(*job) for job in context.track(jobs, what)]


def spikes(norms: Sequence[float], *, times: float = 2.0, window: int = 20) -> int:
    """Steps whose norm is above ``times`` the median of up to ``window`` steps before.

    The first ten steps, where the learning rate warms up, only serve as what comes before.
    """
    return sum(
        norms[step] > times * median(norms[max(0, step - window) : step])
        for step in range(10, len(norms))
    )


def by_window(values: Sequence[float], width: int) -> list[float]:
    """Means of ``width`` values after each other; the last may have fewer."""
    return [fmean(values[first : first + width]) for first in range(0, len(values), width)]


# ---- the study ----


def measure(context: Context) -> dict[str, Any]:
    """``runs``: a record for each data set, arm and seed."""
    runs: list[dict[str, Any]] = []
    for seed in context.seeds:
        start = context.start(seed)
        todo = [(name, arm) for name, arms in ARMS.items() for arm in arms]
        for name, arm in context.track(todo, f"Runs, seed {seed}"):
            runs.append(run_record(start, context.setting, seed, name, arm))
    return {"runs": runs}


def run_record(start: Start, setting: Any, seed: int, data: str, arm: Arm) -> dict[str, Any]:
    """Held-out loss and accuracy along one run on the ``"clean"`` or ``"noisy"`` rows."""
    found = train(
        start,
        start.held_in if data == "clean" else noisy(start, setting),
        judged_batches(start, setting),
        arm,
        setting,
        seed=seed,
    )
    return {
        "seed": seed,
        "data": data,
        "arm": arm.name,
        "alpha": found.alpha,
        "steps": found.steps,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "step_seconds": found.step_seconds,
    }


def judged_batches(start: Start, setting: TrainSetting) -> list[Batch]:
    """The held-out rows that runs are judged by, the same ones for all of a start."""
    return batches(drawn(start.held_out, setting.judged, 0), 4 * setting.batch_size)


def noisy(start: Start, setting: RunSetting) -> list[Row]:
    """The training rows, some with a part of the solution's tokens replaced at random."""
    vocabulary = len(start.tokenizer)
    return [
        row if i % setting.corrupted else corrupt(row, setting.replaced, vocabulary, i)[0]
        for i, row in enumerate(start.held_in)
    ]


# ---- tables and the plot ----


def _runs(result: dict[str, Any], data: str, arm: str) -> list[dict[str, Any]]:
    """One a seed."""
    return [r for r in result["runs"] if (r["data"], r["arm"]) == (data, arm)]


def gap(result: dict[str, Any], data: str, arm: str, place: int = -1) -> Interval:
    """Held-out loss less that of uniform weights, paired by seed; below zero is better."""
    pairs = zip(_runs(result, data, arm), _runs(result, data, UNIFORM.name), strict=True)
    return interval([run["loss"][place] - base["loss"][place] for run, base in pairs])


def _arms(result: dict[str, Any], data: str) -> list[str]:
    return list(dict.fromkeys(r["arm"] for r in result["runs"] if r["data"] == data))


def tables(result: dict[str, Any]) -> list[Table]:
    found = []
    for data, title in TITLES.items():
        rows = []
        for arm in _arms(result, data):
            runs = _runs(result, data, arm)
            seconds = [r["step_seconds"] for r in runs]
            base = [r["step_seconds"] for r in _runs(result, data, UNIFORM.name)]
            accuracy = interval([r["accuracy"][-1] for r in runs])
            rows.append(
                [
                    arm,
                    interval([r["loss"][-1] for r in runs]).text(4),
                    "" if arm == UNIFORM.name else _signed(gap(result, data, arm)),
                    f"{100 * accuracy.mean:.2f}",
                    "" if isnan(sum(seconds)) else f"{sum(seconds) / sum(base):.2f}",
                ]
            )
        headings = ("weights", "held-out loss", "minus uniform", "next token, %", "step time")
        found.append(Table(title, headings, rows, note="Differences are paired by seed."))
    return found


def _signed(value: Interval) -> str:
    return ("+" if value.mean > 0 else "") + value.text(4)


TITLES = {
    "clean": "Clean data, AdamW",
    "noisy": "Half the solutions with 20% of their tokens random, AdamW",
}


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, 1, 2, size=(11, 5), sharey=True) as (drawn_on, grid):
        names = list(dict.fromkeys(r["arm"] for r in result["runs"]))
        handles: dict[str, Any] = {}
        for axes, (data, title) in zip(grid, TITLES.items(), strict=True):
            beyond = []
            for arm in _arms(result, data):
                run = _runs(result, data, arm)[0]
                gaps = [gap(result, data, arm, place) for place in range(len(run["steps"]))]
                if gaps[-1].mean > HIGHEST:
                    beyond.append(f"{arm} ends at +{gaps[-1].mean:.2f}, off the scale")
                    continue
                colour = COLOURS[names.index(arm) % len(COLOURS)]
                means = [g.mean for g in gaps]
                handles[arm] = axes.plot(run["steps"], means, color=colour, marker="o", ms=3)[0]
                if gaps[-1].n > 1:
                    low, high = [g.low for g in gaps], [g.high for g in gaps]
                    axes.fill_between(
                        run["steps"], low, high, color=colour, alpha=0.12, linewidth=0
                    )
            axes.set(title=title, xlabel="optimizer step", ylim=(-0.2, HIGHEST))
            axes.annotate("\n".join(beyond), (0.02, 0.96), xycoords="axes fraction", va="top")
        grid[0].set_ylabel("held-out loss minus uniform's (nats a token)\nbelow 0 is better")
        drawn_on.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)


HIGHEST = 0.5  # nats that the plot reaches
COLOURS = (  # one an arm
    *("#333333", "#8a8f98", "#8d5fb0", "#c58fdc"),
    *("#c8452f", "#e8917f", "#c98a1b", "#2a9d6f", "#3b6fb6"),
)
