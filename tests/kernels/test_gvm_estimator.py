"""The estimator that GVM allocates samples for, on a model whose responses can all be listed."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch

from vcore_kernels import (
    allocate,
    gvm_variance,
    gvm_variance_bound,
    prompt_weights,
    raft_loss,
)

VOCABULARY, LENGTH = 3, 2
RESPONSES = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # [9, 2]
# From every other response to one of nine, and one prompt whose responses are all accepted.
ACCEPTED = torch.tensor(
    [
        [1, 0, 1, 0, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0, 0, 0],
    ],
    dtype=torch.float64,
)
PROMPTS = len(ACCEPTED)
BUDGET = 48


class Truth(NamedTuple):
    chance: torch.Tensor  # [m, 9] of each response
    gradient: torch.Tensor  # [m, 9, P] of its summed log-probability
    accept_rate: torch.Tensor  # [m]
    mean: torch.Tensor  # [m, P] over accepted responses
    rms: torch.Tensor  # [m] of their norms


def token_logp(parameters, prompt, responses):
    """[B, 2]: the second token sees the first; all prompts share the parameters."""
    first, second, mixing = parameters
    start = (prompt[:, None] * first).log_softmax(-1)
    after = (second[responses[:, 0]] + prompt[:, None] * mixing).log_softmax(-1)
    logits = torch.stack([start, after], 1)
    return logits.gather(-1, responses.unsqueeze(-1)).squeeze(-1)


@pytest.fixture(scope="module")
def parameters():
    generator = torch.Generator().manual_seed(3)
    shapes = ((VOCABULARY,), (VOCABULARY, VOCABULARY), (VOCABULARY,))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


@pytest.fixture(scope="module")
def truth(parameters):
    chance, gradient = [], []
    for prompt in range(PROMPTS):
        of_prompt = torch.full((len(RESPONSES),), prompt + 1.0, dtype=torch.float64)
        logp = token_logp(parameters, of_prompt, RESPONSES).sum(1)
        rows = [torch.autograd.grad(x, parameters, retain_graph=True) for x in logp]
        gradient.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]))
        chance.append(logp.detach().exp())
    chance, gradient = torch.stack(chance), torch.stack(gradient)
    torch.testing.assert_close(chance.sum(1), torch.ones(PROMPTS, dtype=torch.float64))
    rate = (chance * ACCEPTED).sum(1)
    among = (chance * ACCEPTED / rate.unsqueeze(1)).unsqueeze(2)
    mean = (among * gradient).sum(1)
    rms = (among * gradient.square()).sum((1, 2)).sqrt()
    return Truth(chance, gradient, rate, mean, rms)


def draw(truth, counts, draws, generator):
    """How often each response came: [draws, m, 9]."""
    drawn = torch.zeros(draws, *truth.chance.shape, dtype=torch.float64)
    for prompt, n in enumerate(counts.tolist()):
        came = torch.multinomial(
            truth.chance[prompt].expand(draws, -1), n, replacement=True, generator=generator
        )
        drawn[:, prompt].scatter_add_(1, came, torch.ones_like(came, dtype=torch.float64))
    return drawn


def estimates(truth, counts, drawn):
    """The estimator of the sum over prompts, in closed form: [draws, P]."""
    weight = ACCEPTED / (counts * truth.accept_rate).unsqueeze(1)
    return torch.einsum("dmr,mr,mrp->dp", drawn, weight, truth.gradient)


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_loss_has_the_estimator_as_its_gradient(parameters, truth, on_policy):
    counts = torch.tensor([5, 9, 2, 4])
    drawn = draw(truth, counts, 1, torch.Generator().manual_seed(0))
    group, kind = [
        index.repeat_interleave(drawn[0].long().flatten())
        for index in torch.cartesian_prod(torch.arange(PROMPTS), torch.arange(9)).T
    ]
    reward = ACCEPTED[group, kind]
    assert 0 < reward.sum() < len(reward)
    weight = prompt_weights(
        group, counts=counts, accept_rate=truth.accept_rate, accepted=reward > 0
    )
    logp = token_logp(parameters, group + 1.0, RESPONSES[kind])
    loss = raft_loss(
        logp,
        logp.detach() if on_policy else None,
        reward,
        prompt_weight=weight,
        aggregation="seq-mean-token-sum",
        num_items=PROMPTS,
    )
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    expected = -estimates(truth, counts, drawn)[0] / PROMPTS
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_unbiased_and_as_variable_as_the_formula_says(truth):
    """Four rules, 4000 estimates each, against five standard errors."""
    generator = torch.Generator().manual_seed(1)
    known = {"accept_rate": truth.accept_rate, "grad_norm": truth.rms}
    full = truth.mean.sum(0)
    exact, measured = {}, {}
    for rule, options in {
        "uniform": {},
        "neyman": {},
        "knapsack": {},
        "gvm": {"alpha": 0.0},
    }.items():
        # One sample for each prompt first: two of the rules give none where all are accepted.
        counts = allocate(rule, BUDGET - PROMPTS, **known, **options) + 1
        sample = estimates(truth, counts, draw(truth, counts, 4000, generator))
        error = sample.std(0) / math.sqrt(len(sample))
        assert ((sample.mean(0) - full).abs() <= 5 * error + 1e-12).all(), rule
        variance = gvm_variance(truth.rms, truth.mean.norm(dim=1), truth.accept_rate, counts)
        exact[rule] = float(variance.sum())
        distance = (sample - full).square().sum(1)
        measured[rule] = float(distance.mean())
        error = float(distance.std()) / math.sqrt(len(distance))
        assert abs(measured[rule] - exact[rule]) <= 5 * error, rule
        assert error < 0.03 * exact[rule]
    assert exact["gvm"] < 0.75 * exact["uniform"]
    assert measured["gvm"] < 0.8 * measured["uniform"]


def test_each_prompt_by_itself(truth):
    generator = torch.Generator().manual_seed(2)
    counts = torch.tensor([3, 20, 6, 12])
    drawn = draw(truth, counts, 4000, generator)
    exact = gvm_variance(truth.rms, truth.mean.norm(dim=1), truth.accept_rate, counts)
    for prompt in range(PROMPTS):
        one = torch.zeros_like(drawn)
        one[:, prompt] = drawn[:, prompt]
        distance = (estimates(truth, counts, one) - truth.mean[prompt]).square().sum(1)
        error = float(distance.std()) / math.sqrt(len(distance))
        assert abs(float(distance.mean() - exact[prompt])) <= 5 * error


def test_the_bound_holds_and_gvm_is_near_the_best_of_all_allocations(truth):
    def variance(counts):
        return float(
            gvm_variance(truth.rms, truth.mean.norm(dim=1), truth.accept_rate, counts).sum()
        )

    known = {"accept_rate": truth.accept_rate, "grad_norm": truth.rms}
    budget = 16
    counts = allocate("gvm", budget, alpha=0.0, **known)
    cuts = itertools.combinations(range(1, budget), PROMPTS - 1)
    every = [
        torch.tensor([b - a for a, b in itertools.pairwise((0, *cut, budget))]) for cut in cuts
    ]
    best = min(map(variance, every))
    bound = gvm_variance_bound(truth.rms, truth.accept_rate, budget, alpha=0.0)
    assert best <= variance(counts) <= 1.2 * best
    # The bound leaves out |mu|^2 / n, and is least for n in proportion to a, before rounding.
    gap = float((truth.mean.square().sum(1) / counts).sum())
    assert bound <= variance(counts) + gap <= 1.1 * bound


def test_a_wrong_weight_is_noticed(parameters, truth):
    """The other weightings estimate something else: the check above can fail."""
    generator = torch.Generator().manual_seed(4)
    counts = torch.tensor([3, 3, 3, 3])
    drawn = draw(truth, counts, 4000, generator)
    kept = (drawn * ACCEPTED).sum(2).clamp(min=1)
    sample = torch.einsum("dmr,mr,mrp->dp", drawn / kept.unsqueeze(2), ACCEPTED, truth.gradient)
    error = sample.std(0) / math.sqrt(len(sample))
    assert ((sample.mean(0) - truth.mean.sum(0)).abs() > 5 * error).any()
