"""The paper's temperature and difference step beside a KL budget: what is stable, what drifts.

The published code weighs by ``softmax((l - l') / (eps * T))`` with the probe's gradient clipped to
norm 1: tau is 1/T, and T divides. Training here is in fp32, where the difference reads the truth.
All arms of a seed begin at the same weights and see the same batches and probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from vcore_kernels import gibbs_weights, variance_control
from vcore_train.directions import descent_direction
from vcore_train.experiments.run import (
    PROBE,
    UNIFORM,
    Arm,
    Home,
    TrainSetting,
    by_window,
    each,
    judged_batches,
    spikes,
    start_at,
    train,
)
from vcore_train.experiments.setting import Context, Start, batches, drawn
from vcore_train.experiments.statistics import pearson
from vcore_train.experiments.temperature_report import EXACT, plot, reading, records, tables
from vcore_train.supervised import SupervisedTokens
from vcore_train.utilities import token_utilities_and_nll

__all__ = ["FULL", "QUICK", "measure", "plot", "reading", "records", "tables"]  # what a study is


@dataclass(frozen=True)
class TemperatureSetting(TrainSetting):
    """``temperatures`` and ``epsilons``: every pair is a run, and so is each of ``budgets`` (nats).

    ``watched``: batches, each with a probe of its own, that are weighed at every judged step of the
    uniform run without training on them. ``other_hidden``: width of another model, which is only
    weighed.
    """

    vocab: int = 300
    length: int = 96
    rows: int = 6000
    steps: int = 40
    judged: int = 128
    judged_every: int = 10
    run_lr: float = 6e-3
    temperatures: tuple[float, ...] = (1e6, 1e4, 1e3, 1e2, 30.0, 10.0, 3.0, 1.0, 1e-2)
    epsilons: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    budgets: tuple[float, ...] = (0.005, 0.02, 0.1, 0.5, 2.0)
    watched: int = 4
    other_hidden: int = 128


# The learning rate by pilot runs on seed 0, 40 to 50 steps. At 2e-3 every run ends below its start,
# at 1.5e-2 uniform weights barely do; 6e-3 is between, so that there is a boundary to see.
FULL = TemperatureSetting.full()
QUICK = TemperatureSetting.quick(
    layers=1,
    batch_size=4,
    train_steps=4,
    steps=4,
    judged=8,
    judged_every=2,
    temperatures=(1e6, 1e2, 10.0, 1e-2),
    epsilons=(1e-4, 1e-3),
    budgets=(0.02, 0.5),
    watched=1,
    other_hidden=48,
    seeds=1,
)
GRID = [10 ** (3 - k / 4) for k in range(21)]  # temperatures of the curves: 1000 to 0.01


# ---- training ----


def measure(context: Context) -> dict[str, Any]:
    """``runs``: a record for each arm and seed. ``weighed``: what fixed temperatures give at the
    judged steps of the uniform runs and at the starts of another model.
    """
    home = Home.of(context)
    setting = home.setting
    assert isinstance(setting, TemperatureSetting)
    other = home._replace(setting=replace(setting, hidden=setting.other_hidden))
    seeds = list(context.seeds)
    places = [(place, seed, place is other) for place in (home, other) for seed in seeds]
    starts = each(context, "Starts", start_records, places)
    jobs = list(product([home], seeds, arms_of(setting)))
    found = each(context, "Runs", run_record, jobs)
    weighed = [record for run in found for record in run.pop("weighed")]
    weighed += [record for there in starts for record in there]
    return {"runs": found, "weighed": weighed}


def arms_of(setting: TemperatureSetting) -> list[Arm]:
    """Uniform weights, each pair of temperature and epsilon, each KL budget."""
    probe = {**PROBE, "probe_max_norm": 1.0}
    difference = {**probe, "utility_method": "finite_difference"}
    return [
        UNIFORM,
        *(
            Arm(
                f"T {temperature:g}, eps {epsilon:g}",
                {**difference, "temperature": temperature, "epsilon": epsilon},
                head="pair",  # the paper's formula takes the losses of both points
            )
            for temperature in setting.temperatures
            for epsilon in setting.epsilons
        ),
        *(Arm(f"KL {budget:g}", {**probe, "kl_budget": budget}) for budget in setting.budgets),
    ]


def run_record(home: Home, seed: int, arm: Arm) -> dict[str, Any]:
    """One run. Figures of its steps are means of those between two judged ones."""
    start, setting = start_at(home, seed), home.setting
    assert isinstance(setting, TemperatureSetting)
    weighed: list[dict[str, Any]] = []

    def watch(step: int, model: Any) -> None:
        weighed.extend(weighed_records(start, model, setting, seed, step))

    found = train(
        start,
        start.held_in,
        judged_batches(start, setting),
        arm,
        setting,
        seed=seed,
        watch=watch if arm == UNIFORM else None,
    )
    options = arm.options
    return {
        "seed": seed,
        "arm": arm.name,
        "temperature": options.get("temperature"),
        "epsilon": options.get("epsilon"),
        "kl_budget": options.get("kl_budget"),
        "steps": found.steps,
        "loss": found.loss,
        "unstable": unstable(found.loss),
        "norm": median(found.norms),
        "norm_largest": max(found.norms),
        "spikes": spikes(found.norms),
        "clipped": sum(norm > 1 for norm in found.norms) / len(found.norms),
        **{
            name: by_window(found.figures[name], setting.judged_every) if found.figures else []
            for name in ("kl", "alpha", "tau")
        },
        "ratio": [
            math.exp(value)
            for value in by_window(
                [math.log(ratio) for ratio in found.figures.get("ratio", [])],
                setting.judged_every,
            )
        ],
        "weighed": weighed,
    }


def start_records(home: Home, seed: int, weigh: bool) -> list[dict[str, Any]]:
    """Makes a start, unless it is kept from before; weighs it where asked to."""
    start = start_at(home, seed)
    if not weigh:
        return []
    return weighed_records(start, start.model, home.setting, seed, 0)


def unstable(loss: Sequence[float]) -> bool:
    """The run ended above its start, or its gradients ceased to be finite."""
    return not loss[-1] <= loss[0]


# ---- weighing without training ----


def weighed_records(
    start: Start, model: Any, setting: Any, seed: int, step: int
) -> list[dict[str, Any]]:
    """KL and V_q/V_u that temperatures give by every estimate of the utilities, mean over batches.

    The derivative has the curves over ``GRID`` too. ``spread``: root of the mean variance of the
    utilities within a trajectory. ``pearson``: with the derivative.
    """
    rows = drawn(start.held_in, 2 * setting.watched * setting.batch_size, 500 + seed)
    halves = batches(rows, setting.batch_size)
    pairs = list(zip(halves[::2], halves[1::2], strict=True))
    directions = [descent_direction(model, [probe], max_norm=1.0) for _, probe in pairs]
    tokens = [SupervisedTokens.of([batch]) for batch, _ in pairs]

    def utilities(epsilon: float | None, bf16: bool) -> list[Tensor]:
        options: dict[str, Any] = (
            {}
            if epsilon is None
            else {"method": "finite_difference", "epsilon": epsilon, "head": "pair"}
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return [
                t.packed([token_utilities_and_nll(model, batch, g, snr=False, **options).utility])
                for t, (batch, _), g in zip(tokens, pairs, directions, strict=True)
            ]

    truth = utilities(None, False)
    found = []
    for epsilon, bf16 in ((None, False), *product(setting.epsilons, (False, True))):
        values = truth if epsilon is None else utilities(epsilon, bf16)
        temperatures = [*setting.temperatures, *(GRID if epsilon is None else [])]
        weighed = [at_temperature(values, tokens, temperature) for temperature in temperatures]
        found.append(
            {
                "seed": seed,
                "hidden": model.config.hidden_size,
                "step": step,
                "estimate": EXACT if epsilon is None else f"eps {epsilon:g}",
                "precision": "bf16" if bf16 else "fp32",
                "pearson": pearson(torch.cat(values), torch.cat(truth)),
                "spread": math.sqrt(
                    fmean(
                        float(part.var(correction=0))
                        for value, t in zip(values, tokens, strict=True)
                        for part in value.split(t.cu_seqlens.diff().tolist())
                    )
                ),
                "temperatures": temperatures,
                "kl": [kl for kl, _ in weighed],
                "ratio": [ratio for _, ratio in weighed],
            }
        )
    return found


def at_temperature(
    utilities: Sequence[Tensor], tokens: Sequence[SupervisedTokens], temperature: float
) -> tuple[float, float]:
    """Mean KL (nats) over the trajectories of all batches, geometric mean of V_q/V_u over batches.

    ``utilities``: one packed vector for each of ``tokens``.
    """
    kl, ratios = [], []
    for values, t in zip(utilities, tokens, strict=True):
        found = gibbs_weights(values, cu_seqlens=t.cu_seqlens, temperature=temperature)
        alpha = variance_control(values, found.q, cap=None, cu_seqlens=t.cu_seqlens)
        kl += found.kl.tolist()
        ratios.append(-2 * math.log(float(alpha)))
    return fmean(kl), math.exp(fmean(ratios))
