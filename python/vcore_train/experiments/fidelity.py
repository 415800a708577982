"""How close every estimator of the utilities comes to float64, for each precision and step."""

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vcore_train.directions import descent_direction
from vcore_train.experiments.exact import exact_utilities
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import (
    Batch,
    Context,
    Setting,
    Start,
    adamw,
    batches,
    collate,
    endless,
    supervised,
    train_step,
)
from vcore_train.experiments.statistics import interval, pearson, spearman, within
from vcore_train.utilities import Method, token_utilities_and_nll


@dataclass(frozen=True)
class Scale(Setting):
    """``judged``, ``probe``: rows whose utilities are compared, rows that the direction averages.

    ``other_steps``: training steps of the models of ``OTHERS``.
    """

    judged: int = 8
    probe: int = 64
    lora_steps: int = 10
    other_steps: int = 40


FULL = Scale()
QUICK = Scale(
    **{
        **vars(Setting.quick()),
        **{"judged": 6, "probe": 16, "lora_steps": 3, "other_steps": 4},
    }
)

EPSILONS = (None, 1e-4, 1e-3, 1e-2, 1e-1)  # None: chosen by token_utilities
PRECISIONS = ("fp32", "bf16 autocast", "bf16 weights", "LoRA over bf16")
METHODS: dict[Method, str] = {
    "jvp": "forward-mode derivative",
    "central": "central difference",
    "finite_difference": "finite difference",
}
ARCHITECTURES = {"qwen3": "Qwen3", "llama": "Llama", "gemma2": "Gemma 2"}
PUBLISHED_EPSILON = 1e-4
PLOTTED_TOKENS = 400


class Estimator(NamedTuple):
    method: Method
    epsilon: float | None = None

    @property
    def published(self) -> bool:
        return self == PUBLISHED


PUBLISHED = Estimator("finite_difference", PUBLISHED_EPSILON)
JVP = Estimator("jvp")
ESTIMATORS = (
    JVP,
    *(Estimator("central", epsilon) for epsilon in EPSILONS),
    *(Estimator("finite_difference", epsilon) for epsilon in EPSILONS),
)


class Case(NamedTuple):
    """A model in one precision, its exact utilities, and how it computes."""

    model: nn.Module
    direction: dict[str, Tensor]
    truth: Tensor
    autocast: bool = False


def measure(context: Context) -> dict[str, Any]:
    """``{"agreement": records, "tokens": the utilities of some tokens of the first seed}``.

    One record for each seed, architecture, precision, method and epsilon; on other architectures
    than Qwen3 only for the derivative and the published probe.
    """
    scale = context.setting
    assert isinstance(scale, Scale)
    records: list[dict[str, Any]] = []
    tokens: dict[str, list[float]] = {}
    for seed, architecture in product(context.seeds, ARCHITECTURES):
        own = architecture == "qwen3"
        there = context if own else context.variant(architecture=architecture)
        start = there.start(seed, steps=None if own else scale.other_steps)
        batch = collate(start.held_in[: scale.judged])
        mask = supervised(batch)
        estimators = ESTIMATORS if own else (JVP, PUBLISHED)
        cases = _cases(start, batch, scale, seed)
        name = f"{ARCHITECTURES[architecture]}, seed {seed}"
        for precision, estimator in context.track(list(product(PRECISIONS, estimators)), name):
            case = cases[precision]
            with _autocast(case.autocast):
                out = token_utilities_and_nll(
                    case.model,
                    batch,
                    case.direction,
                    method=estimator.method,
                    epsilon=estimator.epsilon,
                    # The paper's formula takes the losses of both points.
                    head="pair" if estimator.method == "finite_difference" else "linear",
                )
            records.append(
                {
                    "seed": seed,
                    "architecture": architecture,
                    "precision": precision,
                    "method": estimator.method,
                    "epsilon": estimator.epsilon,
                    "epsilon_taken": out.epsilon,
                    "snr": out.snr,
                    **agreement(out.utility, case.truth, mask),
                }
            )
            shown = {JVP: "jvp", PUBLISHED: "published"}.get(estimator)
            if shown and own and seed == 0 and case.autocast:
                kept = mask.nonzero()[:PLOTTED_TOKENS].unbind(1)
                tokens[shown] = out.utility[kept].tolist()
                tokens["truth"] = case.truth[kept].tolist()
    return {"agreement": records, "tokens": tokens}


def agreement(estimate: Tensor, truth: Tensor, mask: Tensor) -> dict[str, float]:
    """Correlations over all tokens and within trajectories, all [B, T]."""
    result = {}
    for name, statistic in (("pearson", pearson), ("spearman", spearman)):
        result[name] = statistic(estimate[mask], truth[mask])
        each = within(statistic, estimate, truth, mask)
        result[f"within_{name}_median"] = float(each.median())
        result[f"within_{name}_mean"] = float(each.mean())
    return result


def _cases(start: Start, batch: Batch, scale: Scale, seed: int) -> dict[str, Case]:
    rows = start.held_in[scale.judged : scale.judged + scale.probe]

    def case(model: nn.Module) -> Case:
        direction = descent_direction(model, batches(rows, scale.batch_size))
        return Case(model, direction, exact_utilities(model, batch, direction))

    full = case(start.model)
    adapted = with_lora(copy.deepcopy(start.model), seed=seed)
    optimizer, order = adamw(adapted, 1e-3), endless(rows, scale.batch_size)
    for _ in range(scale.lora_steps):  # so that both factors of every adapter have a gradient
        train_step(adapted, optimizer, next(order))
    return {
        "fp32": full,
        "bf16 autocast": full._replace(autocast=True),
        "bf16 weights": case(rounded(start.model)),
        "LoRA over bf16": case(rounded(adapted)),
    }


def with_lora(model: nn.Module, *, seed: int, rank: int = 8) -> Any:
    """``model`` with fresh adapters on all linear layers, the only parameters that train."""
    from peft import LoraConfig, get_peft_model  # needed only here

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", UserWarning)  # PEFT on merging adapters of tied heads
        return get_peft_model(model, config)  # type: ignore[arg-type]


def rounded(model: nn.Module) -> nn.Module:
    """A copy with weights in bf16, adapters left in fp32."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def _autocast(on: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


# ---- what is shown ----


def _values(
    result: dict[str, Any],
    name: str,
    estimator: Estimator,
    precision: str,
    architecture: str = "qwen3",
) -> list[Any]:
    """Figure ``name``, one a seed."""
    return [
        record[name]
        for record in result["agreement"]
        if (record["method"], record["epsilon"]) == estimator
        and record["precision"] == precision
        and record["architecture"] == architecture
    ]


def _label(estimator: Estimator) -> str:
    name = METHODS[estimator.method]
    if estimator == JVP:
        return name
    if estimator.epsilon is None:
        return f"{name}, eps chosen"
    return f"{name}, eps {estimator.epsilon:.0e}" + (" (published)" * estimator.published)


def tables(result: dict[str, Any]) -> list[Table]:
    def table(title: str, name: str, note: str = "") -> Table:
        rows = [
            [_label(e), *(interval(_values(result, name, e, p)).text(4) for p in PRECISIONS)]
            for e in ESTIMATORS
        ]
        return Table(title, ("estimator", *PRECISIONS), rows, note=note)

    others = [
        [
            ARCHITECTURES[architecture],
            _label(e),
            *(interval(_values(result, "pearson", e, p, architecture)).text(4) for p in PRECISIONS),
        ]
        for architecture in ARCHITECTURES
        for e in (JVP, PUBLISHED)
    ]
    steps = [
        [
            _label(e),
            *(
                f"{min(taken):.0e} to {max(taken):.0e}"
                for taken in (_values(result, "epsilon_taken", e, p) for p in PRECISIONS)
            ),
        ]
        for e in ESTIMATORS
        if e.epsilon is None and e != JVP
    ]
    return [
        table("Pearson correlation with the utility in float64, all tokens", "pearson"),
        table("Rank correlation, all tokens", "spearman"),
        table(
            "Pearson correlation within a trajectory, median",
            "within_pearson_median",
            "The ranking within a trajectory is what the weights of VCORE are made of.",
        ),
        table("Rank correlation within a trajectory, median", "within_spearman_median"),
        Table(
            "Architectures: Pearson correlation, all tokens",
            ("model", "estimator", *PRECISIONS),
            others,
            text=2,
            note="Gemma 2 with soft-capped logits and scores and a sliding window in every other "
            "layer.",
        ),
        Table("The steps that were chosen", ("estimator", *PRECISIONS), steps),
        Table(
            "Signal-to-noise ratio that the differences report of themselves, lowest seed",
            ("estimator", *PRECISIONS),
            [
                [_label(e), *(_lowest(_values(result, "snr", e, p)) for p in PRECISIONS)]
                for e in ESTIMATORS
                if e != JVP
            ],
        ),
    ]


def _lowest(ratios: list[float | None]) -> str:
    """None: no noise was found to compare with."""
    return "" if None in ratios else f"{min(r for r in ratios if r is not None):.2g}"


STYLES: dict[Method, str] = {"finite_difference": "-", "central": "--"}
COLOURS = dict(zip(PRECISIONS, ("#8a8f98", "#c8452f", "#c98a1b", "#3b6fb6"), strict=True))


def plot(result: dict[str, Any], path: Path) -> None:
    """Two clouds against the truth, and how differences depend on their step."""
    truth = result["tokens"]["truth"]
    with figure(path, 1, 3, size=(13, 4.2), width_ratios=(1, 1, 1.25)) as (drawn, axes):
        drawn.get_layout_engine().set(wspace=0.04)  # type: ignore[union-attr, call-arg]
        for ax, name, title, colour in (
            (axes[0], "published", "published: difference, eps 1e-4", "#8a8f98"),
            (axes[1], "jvp", "here: forward-mode derivative", "#c8452f"),
        ):
            values = result["tokens"][name]
            ax.axline((0, 0), slope=1, color="#555555", linestyle=":", linewidth=1.2)
            ax.plot(truth, values, ".", color=colour, markersize=4, alpha=0.7)
            r = pearson(torch.tensor(truth), torch.tensor(values))
            ax.set(
                title=f"{title}\nr = {r:.4f}",
                xlabel="utility in float64",
                ylabel="utility in bf16 autocast",
            )
        by_step = axes[2]
        given = [epsilon for epsilon in EPSILONS if epsilon is not None]
        for precision, colour in COLOURS.items():
            for method, style in STYLES.items():
                found = [
                    interval(_values(result, "pearson", Estimator(method, eps), precision))
                    for eps in given
                ]
                by_step.errorbar(
                    given,
                    [f.mean for f in found],
                    [f.half for f in found],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=precision if style == "-" else None,
                )
            exact = interval(_values(result, "pearson", JVP, precision))
            by_step.plot(max(given) * 10, exact.mean, "D", color=colour, markersize=6)
        by_step.set(
            xscale="log",
            ylim=(-0.3, 1.08),
            xlabel="step of the difference",
            ylabel="r with float64",
            title="r against the step (dashed: central)",
        )
        by_step.set_xticks([*given, max(given) * 10], [*(f"{e:.0e}" for e in given), "JVP"])
        by_step.minorticks_off()
        by_step.legend(fontsize=8, loc="lower right")
