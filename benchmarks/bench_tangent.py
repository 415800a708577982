"""Losses of a linear head without gradients, with a tangent, and at two points.

    python -m pytest benchmarks/bench_tangent.py --benchmark-only

The unit is ``hidden @ weight.T`` in the same round. Arithmetic asks for 1 of them for the losses, 2
for losses and tangents by a direction of the hidden states alone (a frozen head), 3 by one of the
weight too.
"""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.bench_head import MAIN, UNIT, Head, Shape, head
from benchmarks.measure import Call
from benchmarks.suite import Bench, gate, product, relative_error
from vcore_kernels import linear_nll, linear_nll_jvp, linear_nll_pair

SHOWN = 32  # rows that are compared with the truth


class Points:
    """The head's problem with a direction, or with a second point a short way along it."""

    def __init__(self, head: Head):
        self.head = head
        generator = torch.Generator().manual_seed(1)
        self.hidden, self.weight = head.hidden.detach(), head.weight
        self.target = head.target
        self.d_hidden = torch.randn(self.hidden.shape, generator=generator).to(self.hidden)
        self.d_weight = torch.randn(self.weight.shape, generator=generator)
        self.d_weight = self.d_weight.mul_(3 / self.hidden.shape[1] ** 0.5).to(self.weight)
        self.other_hidden = (self.hidden.float() - 0.01 * self.d_hidden.float()).to(self.hidden)
        self.other_weight = (self.weight.float() - 0.01 * self.d_weight.float()).to(self.weight)

    def losses(self, hidden: Tensor, weight: Tensor, target: Tensor | None = None) -> Tensor:
        """As eager PyTorch has them, float32 or wider."""
        logits = F.linear(hidden, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, self.target if target is None else target, reduction="none")

    def truth(self, task: str) -> tuple[Tensor, ...]:
        """Of the first rows, in float64."""
        target = self.target[:SHOWN]

        def wide(values: Tensor, rows: int | None = None) -> Tensor:
            return values[:rows].double()

        def losses(hidden: Tensor, weight: Tensor) -> Tensor:
            return self.losses(hidden, weight, target)

        h, w = wide(self.hidden, SHOWN), wide(self.weight)
        if task == "losses":
            return (losses(h, w),)
        moves = "trained" in task
        if "tangent" in task:
            dw = wide(self.d_weight) if moves else torch.zeros_like(w)
            return torch.func.jvp(losses, (h, w), (wide(self.d_hidden, SHOWN), dw))
        other = wide(self.other_weight) if moves else w
        base = losses(h, w)
        return base, base - losses(wide(self.other_hidden, SHOWN), other)


@functools.lru_cache(maxsize=1)
def points_of(shape: Shape, device: torch.device) -> Points:
    return Points(head(shape, device))


def ours(p: Points, task: str) -> Call:
    trained = "trained" in task
    if task == "losses":
        return lambda: (linear_nll(p.hidden, p.weight, p.target),)
    if "tangent" in task:
        d_weight = p.d_weight if trained else None
        return lambda: linear_nll_jvp(p.hidden, p.weight, p.target, p.d_hidden, d_weight)
    other = p.other_weight if trained else None
    return lambda: linear_nll_pair(p.hidden, p.other_hidden, p.weight, p.target, other)


def eager(p: Points, task: str) -> Call:
    trained = "trained" in task
    if task == "losses":
        return lambda: (p.losses(p.hidden, p.weight),)
    if "tangent" in task:
        if trained:
            return lambda: torch.func.jvp(p.losses, (p.hidden, p.weight), (p.d_hidden, p.d_weight))
        return lambda: torch.func.jvp(
            lambda hidden: p.losses(hidden, p.weight), (p.hidden,), (p.d_hidden,)
        )
    weight = p.other_weight if trained else p.weight

    def difference() -> tuple[Tensor, Tensor]:
        base = p.losses(p.hidden, p.weight)
        return base, base - p.losses(p.other_hidden, weight)

    return difference


def compiled(p: Points, task: str) -> Call:
    torch._dynamo.reset()
    losses = torch.compile(p.losses, dynamic=False)
    return lambda: (losses(p.hidden, p.weight),)


def linear_cross_entropy(p: Points, task: str) -> Call:
    return lambda: (F.linear_cross_entropy(p.hidden, p.weight, p.target, reduction="none"),)


def twice(p: Points, task: str) -> Call:
    """Two calls of our own losses and a subtraction: what the pair replaces."""
    weight = p.other_weight if "trained" in task else p.weight

    def call() -> tuple[Tensor, Tensor]:
        base = linear_nll(p.hidden, p.weight, p.target)
        return base, base - linear_nll(p.other_hidden, weight, p.target)

    return call


TASKS = {  # products that the arithmetic asks for
    "losses": 1,
    "tangent, frozen": 2,
    "tangent, trained": 3,
    "difference, frozen": 2,
    "difference, trained": 2,
}
MAKERS: dict[str, Callable[[Points, str], Call]] = {
    "here": ours,
    "eager": eager,
    "torch.compile": compiled,
    "torch linear_cross_entropy, none": linear_cross_entropy,
    "two calls of linear_nll": twice,
}


def cases() -> list:
    found = []
    for task in TASKS:
        wanted = ["here", "eager"]
        wanted += list(MAKERS)[2:4] if task == "losses" else []
        wanted += ["two calls of linear_nll"] if "difference" in task else []
        found += [
            pytest.param(task, name, id=f"{task}-{name}".replace(" ", "_")) for name in wanted
        ]
    return found


@pytest.mark.parametrize(("task", "name"), cases())
def test_tangent(bench: Bench, device, quick, task: str, name: str):
    shape = MAIN.of(quick)
    points = points_of(shape, device)
    size = points.hidden.element_size()
    inputs = shape.n * shape.h + shape.v * shape.h
    is_ours = name == "here"
    row = Row(
        f"{task}: {shape.title}",
        name,
        "ours" if is_ours else "peer",
        unit=UNIT,
        flops=TASKS[task] * shape.flops,
        bytes=size * (2 * inputs if "trained" in task else inputs),
        ceiling=product(shape.dtype),
        logits_bytes=shape.n * shape.v * size,
    )
    truth = points.truth(task)

    def check(result: tuple[Tensor, ...]) -> str:
        """Twice the errors of eager PyTorch in bf16 on the same rows, and one rounding.

        Eager differences of bf16 losses are off by a quarter at this step: ours are judged by one
        rounding alone, those of peers only shown.
        """
        small = Points.__new__(Points)
        small.__dict__ |= points.__dict__
        for part in ("hidden", "d_hidden", "other_hidden", "target"):
            setattr(small, part, getattr(points, part)[:SHOWN])
        expected = eager(small, task)()
        labels = ("loss", task.split(",")[0])
        pairs = list(zip(labels, result, expected, truth, strict=False))
        errors = {label: relative_error(r[:SHOWN], t) for label, r, _, t in pairs}
        eps = torch.finfo(shape.dtype).eps
        factor = 2 if is_ours else 4
        allowed = {label: factor * relative_error(e, t) + eps for label, _, e, t in pairs} | {
            "difference": eps if is_ours else float("inf")
        }
        return gate(errors, allowed)

    with torch.no_grad():
        bench.measure(
            row,
            lambda: MAKERS[name](points, task),
            lambda: torch.mm(points.hidden, points.weight.T),
            check,
            unit_row=Row(
                row.group,
                UNIT,
                "yardstick",
                flops=shape.flops,
                bytes=size * (inputs + shape.n * shape.v),
            ),
            memory="resident",
        )
