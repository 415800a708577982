"""Whether token weights tell corrupted supervision from clean: 20% of some solutions replaced."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vcore_kernels import dft_loss, gibbs_weights, iw_sft_loss
from vcore_train.config import DEFAULT_KL_BUDGET, VcoreConfig
from vcore_train.directions import Direction, EmaDirection, descent_direction
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import (
    Batch,
    Context,
    Row,
    Setting,
    batches,
    collate,
    drawn,
    supervised,
    train_step,
)
from vcore_train.experiments.statistics import auroc, interval, roc_curve
from vcore_train.modeling import IGNORE_INDEX, probing, token_nll
from vcore_train.utilities import Method, token_utilities


@dataclass(frozen=True)
class Scale(Setting):
    """``judged``: trajectories whose weights are looked at; ``followed``: steps on corrupted data.

    Every ``corrupted``-th trajectory has ``replaced`` of its solution tokens replaced.
    ``averaged``: sequences in the averaged direction.
    """

    judged: int = 64
    followed: int = 24
    averaged: int = 256
    corrupted: int = 2
    replaced: float = 0.2


FULL = Scale()
QUICK = Scale(**{**vars(Setting.quick()), **{"judged": 16, "followed": 3, "averaged": 16}})

CHUNK = 16  # sequences in a forward pass, and in a probe
FIRST_WORD = 2  # token ids below are the tokenizer's special ones


class Estimator(NamedTuple):
    """Where VCORE's weights come from."""

    direction: str
    method: Method = "jvp"
    epsilon: float | None = None
    autocast: bool = False  # to bf16


VCORE = {
    "VCORE, average of many": Estimator("averaged"),
    "VCORE, running average": Estimator("ema"),
    "VCORE, one probe": Estimator("probe"),
    "VCORE, average of many clean rows": Estimator("clean"),
    "VCORE, Adam's momentum": Estimator("momentum"),
    "VCORE, Adam's step": Estimator("adam"),
    "one probe, JVP in bf16": Estimator("probe", autocast=True),
    "one probe, difference in bf16, eps 1e-4 (published)": Estimator(
        "probe", "finite_difference", 1e-4, True
    ),
    "one probe, difference in bf16, eps chosen": Estimator(
        "probe", "finite_difference", None, True
    ),
    "one probe, central difference in bf16, eps chosen": Estimator("probe", "central", None, True),
}
OTHERS = ("DFT", "iw-SFT, token level", "the loss itself")
CURVES = (
    *("VCORE, average of many clean rows", "VCORE, one probe"),
    *("one probe, difference in bf16, eps 1e-4 (published)", "DFT", "iw-SFT, token level"),
)


def corrupt(row: Row, share: float, vocabulary: int, seed: int) -> tuple[Row, list[bool]]:
    """``row`` with ``share`` of its solution tokens replaced, and which tokens are clean.

    The end-of-sequence token stays. A replacement is uniform over the other tokens of the
    vocabulary; input and label change together, as in a solution with wrong words in it.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, labels = list(row["input_ids"]), list(row["labels"])
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX][:-1]
    clean = [True] * len(ids)
    chosen = torch.randperm(len(places), generator=generator)[: round(share * len(places))]
    for place in (places[i] for i in chosen.tolist()):
        new = int(torch.randint(FIRST_WORD, vocabulary - 1, (), generator=generator))
        ids[place] = labels[place] = new + (new >= ids[place])
        clean[place] = False
    return {"input_ids": ids, "labels": labels}, clean


class Weighed(NamedTuple):
    """The supervised tokens of one trajectory."""

    weights: Tensor
    clean: Tensor  # bool

    @property
    def corrupted(self) -> bool:
        return not bool(self.clean.all())


def measure(context: Context) -> dict[str, Any]:
    """``{"areas": one record a seed and method, "curves": points of some ROC curves}``.

    From the start, a few steps of plain supervision on data corrupted in the same way give iw-SFT
    something to compare with its reference (the start) and the running average its state. Then
    fresh corrupted trajectories are weighed. Probes are drawn from corrupted data too, but for one
    direction, which is what a trusted set of clean rows would give.
    """
    scale = context.setting
    assert isinstance(scale, Scale)
    areas: list[dict[str, Any]] = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for seed in context.seeds:
        start, reference = context.start(seed), context.start(seed).model
        mixed = [
            corrupt(
                row,
                0.0 if place % scale.corrupted else scale.replaced,
                len(start.tokenizer),
                1_000_003 * seed + place,
            )
            for place, row in enumerate(start.held_in)
        ]
        judged, rest = mixed[: scale.judged], [row for row, _ in mixed[scale.judged :]]
        clean_rows = start.held_in[scale.judged :]
        ema = EmaDirection(VcoreConfig.ema_decay)
        for step in context.track(range(scale.followed), f"Training on, seed {seed}"):
            fresh = drawn(rest, scale.batch_size + CHUNK, 31 * seed + step)
            descent_direction(start.model, collate(fresh[:CHUNK]), kind="ema", ema=ema)
            train_step(start.model, start.optimizer, collate(fresh[CHUNK:]))
        directions = {
            "probe": descent_direction(start.model, collate(drawn(rest, CHUNK, seed))),
            "averaged": descent_direction(
                start.model, batches(drawn(rest, scale.averaged, 100 + seed), CHUNK)
            ),
            "clean": descent_direction(
                start.model, batches(drawn(clean_rows, scale.averaged, 100 + seed), CHUNK)
            ),
            "ema": ema.direction(),
            "momentum": descent_direction(
                start.model, [], kind="momentum", optimizer=start.optimizer
            ),
            "adam": descent_direction(start.model, [], kind="adam", optimizer=start.optimizer),
        }
        found: dict[str, list[Weighed]] = {}
        for first in context.track(range(0, len(judged), CHUNK), f"Weighing, seed {seed}"):
            part = judged[first : first + CHUNK]
            batch = collate([row for row, _ in part])
            mask = supervised(batch)
            for name, weights in all_weights(start.model, reference, batch, directions).items():
                for row, row_mask, (_, clean) in zip(weights, mask, part, strict=True):
                    places = row_mask.nonzero()[:, 0]
                    found.setdefault(name, []).append(
                        Weighed(row[places], torch.tensor(clean)[places])
                    )
        for name, trajectories in found.items():
            areas.append({"seed": seed, "method": name, **_areas(trajectories)})
            if seed == 0 and name in CURVES:
                curves[name] = roc_curve(*_joined([t for t in trajectories if t.corrupted]))
    return {"areas": areas, "curves": curves, "default": VcoreConfig.direction}


def all_weights(
    model: nn.Module, reference: nn.Module, batch: Batch, directions: Mapping[str, Direction]
) -> dict[str, Tensor]:
    """The weight that every method gives each token, [B, T], by method.

    VCORE's are those of the library's default budget. The weight of a loss that is a sum over
    tokens is its derivative in the token's loss.
    """
    mask = supervised(batch)
    with torch.no_grad(), probing(model, attention=None), probing(reference, attention=None):
        nll, reference_logp = token_nll(model, batch), -token_nll(reference, batch)
    found = {}
    for name, estimator in VCORE.items():
        with _autocast(estimator.autocast):
            utility = token_utilities(
                model,
                batch,
                directions[estimator.direction],
                method=estimator.method,
                epsilon=estimator.epsilon,
                # The paper's formula takes the losses of both points.
                head="pair" if estimator.method == "finite_difference" else "linear",
            )
        q = gibbs_weights(
            utility, mask=mask, kl_budget=DEFAULT_KL_BUDGET, kl_scope=VcoreConfig.kl_scope
        ).q
        found[name] = q * mask.sum(-1, keepdim=True)
    nll.requires_grad_()
    dft = dft_loss(nll, mask=mask, num_items=1)
    iw_sft = iw_sft_loss(nll, reference_logp, mask=mask, level="token", num_items=1)
    for name, loss in (("DFT", dft), ("iw-SFT, token level", iw_sft)):
        found[name] = torch.autograd.grad(loss, nll)[0]
    found["the loss itself"] = nll.detach()
    return found


def _autocast(on: bool) -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()


def _joined(trajectories: Sequence[Weighed]) -> tuple[Tensor, Tensor]:
    weights, clean = zip(*trajectories, strict=True)
    return torch.cat(weights), torch.cat(clean)


def _areas(trajectories: Sequence[Weighed]) -> dict[str, float]:
    """``within``: mean area over corrupted trajectories; ``pooled``: over all their tokens at once.

    ``all``: the tokens of clean trajectories too. ``ratio``: mean weight of a corrupted token to
    that of a clean one.
    """
    corrupted = [t for t in trajectories if t.corrupted]
    each = [auroc(t.weights, t.clean) for t in corrupted]
    weights, clean = _joined(trajectories)
    return {
        "within": sum(each) / len(each),
        "pooled": auroc(*_joined(corrupted)),
        "all": auroc(weights, clean),
        "ratio": float(weights[~clean].mean() / weights[clean].mean()),
    }


# ---- what is shown ----


def _is_default(result: dict[str, Any], method: str) -> bool:
    return VCORE.get(method) == Estimator(result["default"])


def _interval(result: dict[str, Any], method: str, name: str) -> Any:
    return interval([r[name] for r in result["areas"] if r["method"] == method])


def tables(result: dict[str, Any]) -> list[Table]:
    figures = ("within", "pooled", "all", "ratio")
    rows = [
        [
            method + (" (default)" if _is_default(result, method) else ""),
            *(_interval(result, method, name).text() for name in figures),
        ]
        for method in (*VCORE, *OTHERS)
    ]
    return [
        Table(
            'Area under the ROC curve of "clean" by weight',
            [
                *("weight", "within a trajectory", "corrupted trajectories", "all tokens"),
                "weight of a corrupted token",
            ],
            rows,
            note="0.5: the weights know nothing; 1: every clean token weighs more than every "
            "corrupted one. within a trajectory: mean over the corrupted ones. weight of a "
            f"corrupted token: relative to a clean one, at a budget of {DEFAULT_KL_BUDGET} nats "
            'for VCORE. DFT ranks tokens by their loss, so "the loss itself" is its mirror image.',
        )
    ]


FOUND, DIFFERENCE, OTHER = "#c8452f", "#8a8f98", "#3b6fb6"
COLOURS = dict(zip(CURVES, ("#c8452f", "#e39a8b", "#8a8f98", "#2a9d6f", "#c98a1b"), strict=True))


def plot(result: dict[str, Any], path: Path) -> None:
    methods = (*VCORE, *OTHERS)
    with figure(path, 1, 2, size=(11, 5.2), width_ratios=(1.5, 1)) as (drawn_figure, (left, right)):
        for place, method in enumerate(reversed(methods)):
            found = _interval(result, method, "within")
            colour = FOUND if method in VCORE else OTHER
            if "difference" in method:
                colour = DIFFERENCE
            left.errorbar(found.mean, place, xerr=found.half, fmt="o", color=colour, capsize=3)
            left.text(1.09, place, found.text(2), va="center", fontsize=8)
        left.set_yticks(range(len(methods)), list(reversed(methods)), fontsize=8)
        left.set_xticks([0, 0.25, 0.5, 0.75, 1])
        left.axvline(0.5, color="#555555", linestyle=":", linewidth=1.2)
        left.set(
            xlim=(-0.05, 1.4),
            xlabel="area under the ROC curve within a trajectory (0.5: chance)",
            title="Do the weights find the clean tokens?",
        )
        for name, points in result["curves"].items():
            right.plot(*zip(*points, strict=True), color=COLOURS[name], label=name, linewidth=1.6)
        right.plot((0, 1), (0, 1), color="#555555", linestyle=":", linewidth=1.2)
        right.set(
            xlabel="share of the corrupted tokens kept",
            ylabel="share of the clean tokens kept",
            title="Keeping the tokens of highest weight",
        )
        drawn_figure.legend(loc="outside lower center", ncols=3, fontsize=8)
