"""Gibbs weights of 32 trajectories of 3,000 tokens, beside a copy and a softmax of the utilities.

    python -m pytest benchmarks/bench_gibbs.py --benchmark-only

Four fifths of each trajectory are supervised (a prompt before them), padded or packed. The unit is
a copy of the utilities in the same round: the least that any rule must move; all stay in the cache,
so that there is no ceiling to count against. Nobody else has a rule
with a budget; where tau is given, a softmax computes the same. "reference" is this library's own
in eager PyTorch.
"""

import pytest
import torch
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.suite import Bench, gate, names, relative_error
from vcore_kernels import backends, gibbs_weights, vcore_loss

RULES = {
    "tau": {"tau": 1.0},
    "kl 0.1": {"kl_budget": 0.1},
    "kl 2": {"kl_budget": 2.0},
    "kl 0.1, batch": {"kl_budget": 0.1, "kl_scope": "batch"},
}
SUBJECTS = ("gibbs_weights", "gibbs_weights, packed", "reference", "torch softmax")
REPEATS = 8  # calls in a round: one is too short for the clock
UNIT = "copy"


class Batch:
    def __init__(self, quick: bool, device: torch.device):
        self.rows, self.length = (4, 60) if quick else (32, 3000)
        generator = torch.Generator().manual_seed(0)
        both = torch.randn(2, self.rows, self.length, generator=generator).to(device)
        self.utility, self.nll = both[0].contiguous(), both[1].abs()
        prompt = self.length // 5
        self.mask = torch.zeros(self.utility.shape, dtype=torch.bool, device=device)
        self.mask[:, prompt:] = True
        self.packed = self.utility[self.mask]
        ends = torch.arange(self.rows + 1, dtype=torch.int32) * (self.length - prompt)
        self.cu_seqlens = ends.to(device)
        self.out = torch.empty_like(self.utility)

    def call(self, name: str, rule: dict) -> Call:
        if name == "torch softmax":
            return lambda: (
                (self.utility * rule["tau"]).masked_fill(~self.mask, -torch.inf).softmax(-1)
            )
        if name == "gibbs_weights, packed":
            return lambda: gibbs_weights(self.packed, cu_seqlens=self.cu_seqlens, **rule).q
        backend = "reference" if name == "reference" else "auto"
        return lambda: gibbs_weights(self.utility, mask=self.mask, backend=backend, **rule).q

    def truth(self, rule: dict) -> Tensor:
        """The weights from the reference in float64."""
        return gibbs_weights(self.utility.double(), mask=self.mask, backend="reference", **rule).q


def repeated(call: Call) -> Call:
    def many():
        for _ in range(REPEATS):
            result = call()
        return result

    return many


def cases() -> list:
    return [
        pytest.param(rule, name, id="-".join(names([rule, name])))
        for rule in RULES
        for name in SUBJECTS
        if name != "torch softmax" or rule == "tau"
    ]


@pytest.mark.parametrize(("rule", "name"), cases())
def test_gibbs_weights(bench: Bench, device, quick, rule, name):
    batch = Batch(quick, device)
    row = Row(
        f"gibbs weights, {rule}: {batch.rows} x {batch.length}, {REPEATS} calls",
        name,
        "ours" if name.startswith("gibbs_weights") else "peer",
        unit=UNIT,
        bytes=REPEATS * 2.0 * batch.utility.nbytes,
    )
    truth = batch.truth(RULES[rule])

    def check(q: Tensor) -> str:
        """Weights within 1e-4 of those in float64, and they sum to 1."""
        expected = truth[batch.mask] if "packed" in name else truth
        total = q.sum().item() / batch.rows - 1
        return gate({"q": relative_error(q, expected), "sum": abs(total)}, {"q": 1e-4, "sum": 1e-5})

    bench.measure(
        row,
        lambda: repeated(batch.call(name, RULES[rule])),
        repeated(lambda: batch.out.copy_(batch.utility)),
        check,
        unit_row=Row(row.group, UNIT, "yardstick", bytes=row.bytes),
        memory="allocator",
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_vcore_loss(bench: Bench, device, quick, backend):
    """The whole objective on losses and utilities: weights, variance control, sum."""
    if backend == "reference" and not backends()["cpp"]:
        pytest.skip("auto is the reference here: the compiled kernels are missing")
    batch = Batch(quick, device)

    def call(backend: str = backend) -> Tensor:
        return vcore_loss(
            batch.nll, batch.utility, mask=batch.mask, kl_budget=0.1, backend=backend
        ).loss

    row = Row(
        f"vcore_loss: {batch.rows} x {batch.length}, {REPEATS} calls",
        "vcore_loss" if backend == "auto" else "reference",
        "ours" if backend == "auto" else "peer",
        unit=UNIT,
        bytes=REPEATS * (3.0 * batch.utility.nbytes + batch.mask.nbytes),
    )
    bench.measure(
        row,
        lambda: repeated(call),
        repeated(lambda: batch.out.copy_(batch.utility)),
        lambda loss: gate({"loss": relative_error(loss, call("reference"))}, {"loss": 1e-5}),
        unit_row=Row(row.group, UNIT, "yardstick", bytes=REPEATS * 2.0 * batch.utility.nbytes),
        memory="allocator",
    )
