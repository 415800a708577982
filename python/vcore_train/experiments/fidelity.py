"""How close every estimator of the utilities comes to float64, for each precision and step."""

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
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
    Row,
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

FULL = Setting.full()
QUICK = Setting.quick()

EPSILONS = (None, 1e-4, 1e-3, 1e-2, 1e-1)  # None: chosen by token_utilities
PRECISIONS = ("fp32", "bf16 autocast", "bf16 weights", "LoRA over bf16")
METHODS: dict[Method, str] = {
    "jvp": "forward-mode derivative",
    "central": "central difference",
    "finite_difference": "finite difference",
}
PUBLISHED = ("finite_difference", "bf16 autocast", 1e-4)
PLOTTED_TOKENS = 400
PROBE_BATCHES = 4
LORA_STEPS = 10


class Case(NamedTuple):
    """A model in one precision, its exact utilities, and how it computes."""

    model: nn.Module
    direction: dict[str, Tensor]
    truth: Tensor
    autocast: bool


def measure(context: Context) -> dict[str, Any]:
    """``{"agreement": one record a seed, precision, method and epsilon, "tokens": a sample}``."""
    records: list[dict[str, Any]] = []
    sample: dict[str, list[float]] = {}
    for seed in context.seeds:
        start = context.start(seed)
        rows, size = start.held_in, context.setting.batch_size
        batch, mask = collate(rows[:size]), supervised(collate(rows[:size]))
        cases = _cases(start, batch, rows[size : (1 + PROBE_BATCHES) * size], size, seed)
        runs = [
            (precision, method, epsilon)
            for precision in PRECISIONS
            for method in METHODS
            for epsilon in (EPSILONS if method != "jvp" else (None,))
        ]
        for precision, method, epsilon in context.track(runs, f"Estimators, seed {seed}"):
            case = cases[precision]
            with _autocast(case.autocast):
                out = token_utilities_and_nll(
                    case.model, batch, case.direction, method=method, epsilon=epsilon
                )
            records.append(
                {
                    "seed": seed,
                    "precision": precision,
                    "method": method,
                    "epsilon": epsilon,
                    "epsilon_taken": out.epsilon,
                    **agreement(out.utility, case.truth, mask),
                }
            )
            if seed == 0 and precision == PUBLISHED[1]:
                kept = mask.nonzero()[:PLOTTED_TOKENS].unbind(1)
                if method == "jvp" or (method, precision, epsilon) == PUBLISHED:
                    sample[method] = out.utility[kept].tolist()
                    sample["truth"] = case.truth[kept].tolist()
    return {"agreement": records, "tokens": sample}


def agreement(estimate: Tensor, truth: Tensor, mask: Tensor) -> dict[str, float]:
    """Correlations over all tokens and within trajectories, all [B, T]."""
    result = {}
    for name, statistic in (("pearson", pearson), ("spearman", spearman)):
        result[name] = statistic(estimate[mask], truth[mask])
        each = within(statistic, estimate, truth, mask)
        result[f"within_{name}_median"] = float(each.median())
        result[f"within_{name}_mean"] = float(each.mean())
    return result


def _cases(
    start: Start, batch: Batch, probe_rows: list[Row], size: int, seed: int
) -> dict[str, Case]:
    def case(model: nn.Module, autocast: bool = False) -> Case:
        probe = batches(probe_rows, size)
        direction = descent_direction(model, probe)
        return Case(model, direction, exact_utilities(model, batch, direction), autocast)

    full = case(start.model)
    adapted = with_lora(copy.deepcopy(start.model), seed=seed)
    optimizer, order = adamw(adapted, 1e-3), endless(probe_rows, size)
    for _ in range(LORA_STEPS):  # so that both factors of every adapter have a gradient
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


def _values(result: dict[str, Any], name: str, **wanted: Any) -> list[float]:
    """Figure ``name`` of the records with these properties, one a seed."""
    return [
        record[name]
        for record in result["agreement"]
        if all(record[key] == value for key, value in wanted.items())
    ]


def tables(result: dict[str, Any]) -> list[Table]:
    headings = (
        *("precision", "estimator", "epsilon", "Pearson", "rank"),
        *("within: Pearson", "within: rank"),
    )
    figures = ("pearson", "spearman", "within_pearson_median", "within_spearman_median")
    rows = []
    for precision in PRECISIONS:
        for method, label in METHODS.items():
            for epsilon in EPSILONS if method != "jvp" else (None,):
                found = {"precision": precision, "method": method, "epsilon": epsilon}
                published = (method, precision, epsilon) == PUBLISHED
                rows.append(
                    [
                        precision,
                        label + (" (published)" if published else ""),
                        _epsilon(result, found),
                        *(interval(_values(result, name, **found)).text(4) for name in figures),
                    ]
                )
    return [
        Table(
            "Correlation with the utility in float64",
            headings,
            rows,
            text=2,
            note="within: the median over trajectories of the correlation inside each.",
        )
    ]


def _epsilon(result: dict[str, Any], found: dict[str, Any]) -> str:
    if found["method"] == "jvp":
        return ""
    if found["epsilon"] is not None:
        return f"{found['epsilon']:.0e}"
    taken = sorted(_values(result, "epsilon_taken", **found))
    return f"chosen: {taken[len(taken) // 2]:.0e}"


def plot(result: dict[str, Any], path: Path) -> None:
    with figure(path, size=(6, 4)) as (_, axes):
        axes.plot(result["tokens"]["truth"], result["tokens"]["jvp"], ".")
