"""Gibbs weights beside a copy and a softmax of the same utilities.

    python -m pytest benchmarks/bench_gibbs.py -q          (--benchmark-json=FILE keeps the figures)

A batch of 32 trajectories of 3,000 tokens, four fifths of each supervised (a prompt before them),
and the same supervised tokens packed. Set OMP_NUM_THREADS=1 for the cost on one core.
"""

import pytest
import torch

from vcore_kernels import backends, gibbs_weights, vcore_loss

BACKENDS = [name for name in ("cpp", "reference") if backends()[name]]
RULES = {
    "tau": {"tau": 1.0},
    "kl 0.1": {"kl_budget": 0.1},
    "kl 2": {"kl_budget": 2.0},
    "kl 0.1 batch": {"kl_budget": 0.1, "kl_scope": "batch"},
}


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    utility, nll = torch.randn(2, 32, 3000, generator=generator).unbind()
    mask = torch.zeros(32, 3000, dtype=torch.bool)
    mask[:, 600:] = True
    cu_seqlens = torch.arange(33, dtype=torch.int32) * 2400
    return utility, nll.abs(), mask, cu_seqlens


def check(utility, mask, rule):
    """The gate: every backend gives weights that sum to 1 and meet the budget, and they agree."""
    results = [gibbs_weights(utility, mask=mask, backend=name, **rule) for name in BACKENDS]
    for result in results:
        torch.testing.assert_close(result.q.sum(1), torch.ones(32))
        torch.testing.assert_close(result.q, results[0].q, rtol=1e-4, atol=1e-9)
        if "kl_budget" in rule:
            torch.testing.assert_close(result.kl.mean().item(), rule["kl_budget"])


@pytest.mark.parametrize("name", ["copy", "softmax"])
def test_yardstick(benchmark, batch, name):
    utility = batch[0]
    out = torch.empty_like(utility)
    run = {"copy": lambda: out.copy_(utility), "softmax": lambda: utility.softmax(-1)}[name]
    benchmark(run)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_gibbs_weights(benchmark, batch, backend, rule, layout):
    utility, _, mask, cu_seqlens = batch
    options = {**RULES[rule], "backend": backend}
    check(utility, mask, RULES[rule])
    if layout == "padded":
        benchmark(gibbs_weights, utility, mask=mask, **options)
    else:
        benchmark(gibbs_weights, utility[mask], cu_seqlens=cu_seqlens, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vcore_loss(benchmark, batch, backend):
    utility, nll, mask, _ = batch
    check(utility, mask, {"kl_budget": 0.1})
    benchmark(vcore_loss, nll, utility, mask=mask, kl_budget=0.1, backend=backend)
