"""How close every estimator of the utilities comes to float64, on a small trained Qwen3.

``pytest tests/train/test_fidelity.py -s`` prints the table.
"""

import copy
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from exact import exact_utilities
from tiny import with_lora
from trained import arithmetic_batches, train, trained_model, trained_qwen3
from vcore_train.directions import descent_direction
from vcore_train.modeling import supervised_labels
from vcore_train.utilities import token_utilities, token_utilities_and_nll


class Agreement(NamedTuple):
    """Correlations with the truth: over all tokens, and the median over trajectories."""

    pearson: float
    rank: float
    within_pearson: float
    within_rank: float


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1])


def ranks(values):
    return values.argsort().argsort()


def agreement(estimate, truth, mask):
    rows = [(e[m], t[m]) for e, t, m in zip(estimate, truth, mask, strict=True) if m.sum() > 2]
    within = torch.tensor([[correlation(*r), correlation(*map(ranks, r))] for r in rows])
    pooled = estimate[mask], truth[mask]
    return Agreement(
        correlation(*pooled), correlation(*map(ranks, pooled)), *within.median(0).values.tolist()
    )


ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base():
    return trained_qwen3(40, layers=3, hidden=64)


@pytest.fixture(scope="module", params=["full", "lora"])
def trained(base, request):
    """(model, batch, direction) with a direction from other batches."""
    model = copy.deepcopy(base)
    if request.param == "lora":
        model = with_lora(model, targets=ALL_LINEAR)
        train(model, arithmetic_batches(5, seed=5), 1e-3)
    batch, *others = arithmetic_batches(4, seed=99)
    return model, batch, descent_direction(model, others)


def rounded(model):
    """``model`` with weights in bf16, adapters left in fp32; the truth is then taken there."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


ESTIMATORS = {  # precision, method, epsilon (None: chosen), least agreement asked for
    "jvp, bf16 autocast": ("autocast", "jvp", None, 0.999),
    "jvp, bf16 weights": ("weights", "jvp", None, 0.998),
    "jvp, fp32": ("fp32", "jvp", None, 0.99999),
    "finite difference, fp32, eps 1e-4": ("fp32", "finite_difference", 1e-4, 0.999),
    "finite difference, fp32, eps chosen": ("fp32", "finite_difference", None, 0.999),
    "central difference, fp32, eps chosen": ("fp32", "central", None, 0.999),
    "finite difference, bf16 autocast, eps 1e-4 (published)": (
        "autocast",
        "finite_difference",
        1e-4,
        None,
    ),
    "finite difference, bf16 autocast, eps chosen": ("autocast", "finite_difference", None, 0.95),
    "central difference, bf16 autocast, eps chosen": ("autocast", "central", None, 0.97),
    "finite difference, bf16 weights, eps chosen": ("weights", "finite_difference", None, 0.95),
    "central difference, bf16 weights, eps chosen": ("weights", "central", None, 0.97),
}


def test_fidelity(trained, request):
    model, batch, direction = trained
    mask = supervised_labels(batch) != -100
    models = {"fp32": model, "weights": rounded(model)}
    models["autocast"] = model
    truths = {k: exact_utilities(models[k], batch, direction) for k in ("fp32", "weights")}
    truths["autocast"] = truths["fp32"]
    print(f"\n{request.node.callspec.id}: {int(mask.sum())} tokens")
    print(f"{'':56s} pearson    rank  within: pearson    rank       eps")
    measured = {}
    for name, (precision, method, epsilon, _) in ESTIMATORS.items():
        cast = precision == "autocast"
        with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
            out = token_utilities_and_nll(
                models[precision], batch, direction, method=method, epsilon=epsilon
            )
        a = measured[name] = agreement(out.utility, truths[precision], mask)
        step = "" if out.epsilon is None else f"{out.epsilon:9.2e}"
        print(f"{name:56s} {a[0]:7.5f} {a[1]:7.5f} {a[2]:15.5f} {a[3]:7.5f} {step}")
    for name, (_, method, _, least) in ESTIMATORS.items():
        if least is not None:
            values = measured[name] if method == "jvp" else measured[name][:1]
            assert min(values) >= least, f"{name}: {measured[name]}"


FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "gemma2": {
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fidelity_of_other_families(family):
    """The forward-mode derivative in 16 bits; test_fidelity has Qwen3."""
    model = trained_model(family, 20, **FAMILIES[family])
    adapted = with_lora(copy.deepcopy(model), targets=ALL_LINEAR)
    train(adapted, arithmetic_batches(3, seed=5), 1e-3)
    batch, other = arithmetic_batches(2, seed=99)
    mask = supervised_labels(batch) != -100
    print(f"\n{family}: {int(mask.sum())} tokens")
    for name, probed, cast in (
        ("bf16 autocast", model, True),
        ("bf16 weights", rounded(model), False),
        ("LoRA over bf16", rounded(adapted), False),
        ("LoRA, bf16 autocast", adapted, True),
    ):
        direction = descent_direction(probed, other)
        truth = exact_utilities(probed, batch, direction)
        with torch.autocast("cpu", torch.bfloat16) if cast else nullcontext():
            utility = token_utilities(probed, batch, direction)
        a = agreement(utility, truth, mask)
        print(f"{name:56s} {a[0]:7.5f} {a[1]:7.5f} {a[2]:15.5f} {a[3]:7.5f}")
        assert a.pearson >= 0.999
        assert a.within_pearson >= 0.999
