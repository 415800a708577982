import math

import pytest
import torch
from policy_formulas import AGGREGATIONS, aggregated, batch, clipped

from vcore_kernels import (
    aggregation_items,
    grpo_loss,
    linear_nll,
    prompt_weights,
    raft_loss,
    sft_loss,
)

REWARD = torch.tensor([1.0, 0.0, 0.5, -2.0, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 3.0, 1.0, math.inf], dtype=torch.float64)
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)


@each_aggregation
@pytest.mark.parametrize("vanilla", [False, True])
@pytest.mark.parametrize("options", [{}, {"prompt_weight": WEIGHT}, {"num_items": 9}])
def test_token_by_token(aggregation, vanilla, options):
    logp, old_logp, _, mask = batch()
    old = None if vanilla else old_logp
    clips = {"clip_low": 0.1, "clip_high": 0.3, "max_length": 11}
    loss = raft_loss(logp, old, REWARD, mask=mask, aggregation=aggregation, **clips, **options)
    losses = [
        [
            -max(a, 0) * new if vanilla else clipped(math.exp(new - old), max(a, 0), 0.1, 0.3)
            for new, old in zip(*rows, strict=True)
        ]
        for a, *rows in zip(REWARD.tolist(), logp.tolist(), old_logp.tolist(), strict=True)
    ]
    weight = options.get("prompt_weight")
    weight = None if weight is None else [*weight[:4].tolist(), 0.0]
    truth = aggregated(
        losses, mask.tolist(), aggregation, weight, options.get("num_items"), max_length=11
    )
    assert float(loss.detach()) == pytest.approx(truth, rel=1e-12)


@each_aggregation
@pytest.mark.parametrize("vanilla", [False, True])
def test_gradient(aggregation, vanilla):
    logp, old_logp, _, mask = batch(3, 4)

    def run(logp):
        old = None if vanilla else old_logp
        reward, weight = REWARD[:3], WEIGHT[:3]
        return raft_loss(
            logp, old, reward, mask=mask, prompt_weight=weight, aggregation=aggregation
        )

    assert torch.autograd.gradcheck(run, logp)


@each_aggregation
def test_on_policy_the_ratio_is_one(aggregation):
    logp, _, _, mask = batch(dtype=torch.float32)
    kwargs = {"mask": mask, "aggregation": aggregation}
    ones = torch.ones(5)
    loss = raft_loss(logp, logp.detach(), ones, **kwargs)
    minus_one = raft_loss(torch.ones_like(logp), None, ones, **kwargs)
    assert torch.equal(loss.detach(), minus_one)
    (gradient,) = torch.autograd.grad(loss, logp)
    (plain,) = torch.autograd.grad(raft_loss(logp, None, ones, **kwargs), logp)
    assert torch.equal(gradient, plain)
    assert torch.equal(loss, grpo_loss(logp, logp.detach(), ones, **kwargs))


def test_vanilla_raft_on_accepted_responses_is_sft():
    logp, _, _, mask = batch(dtype=torch.float32)
    loss = raft_loss(logp, None, torch.ones(5), mask=mask)
    torch.testing.assert_close(loss, sft_loss(-logp, mask=mask), rtol=1e-6, atol=0)


@each_aggregation
def test_micro_batches_add_up(aggregation):
    logp, old_logp, _, mask = batch(7, 5)
    reward = torch.cat([REWARD, REWARD[:2]])
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    tensors = (logp, old_logp, reward, mask, weight)

    def run(part, length, num_items=None):
        new, old, good, kept, much = (x[part] for x in tensors)
        new, old, kept = (x[:, :length] for x in (new, old, kept))
        return raft_loss(
            new, old, good, mask=kept, prompt_weight=much, aggregation=aggregation,
            max_length=9, num_items=num_items,
        )  # fmt: skip

    mask[4:, 3:] = False  # a micro-batch that is padded less
    parts = [(slice(0, 3), 5), (slice(3, 4), 5), (slice(4, 7), 3)]
    items = sum(aggregation_items(mask[part, :length], aggregation) for part, length in parts)
    whole = run(slice(0, 7), 5)
    halves = sum(run(*part, items) for part in parts)
    torch.testing.assert_close(halves, whole, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(x, logp)[0] for x in (halves, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=0)


@each_aggregation
@pytest.mark.parametrize("vanilla", [False, True])
def test_what_does_not_count_may_hold_anything(aggregation, vanilla):
    logp, old_logp, _, mask = batch()
    hostile = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0], dtype=logp.dtype)
    weight = WEIGHT.clone()
    weight[2] = 0
    counts = mask & ((REWARD > 0) & (weight != 0)).unsqueeze(1)
    results = []
    for fill in (torch.zeros_like(logp), hostile.expand(5, 6)):
        new = torch.where(counts, logp.detach(), fill).requires_grad_()
        old = None if vanilla else torch.where(counts, old_logp, fill.flip(1))
        reward = REWARD.clone()
        reward[4] = fill[0, 0]
        loss = raft_loss(new, old, reward, mask=mask, prompt_weight=weight, aggregation=aggregation)
        loss.backward()
        assert not new.grad[~counts].any()
        results.append((loss.detach(), new.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].isfinite()


@each_aggregation
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
def test_nothing_left_is_a_connected_zero(aggregation, shape):
    for masked in (True, False):
        logp = torch.full(shape, math.nan).requires_grad_()
        mask = torch.full(shape, not masked)
        reward = torch.ones(shape[0]) if masked else torch.zeros(shape[0])
        loss = raft_loss(logp, logp.detach(), reward, mask=mask, aggregation=aggregation)
        assert loss == 0
        loss.backward()
        assert torch.equal(logp.grad, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_ratios(dtype):
    logp = torch.tensor([[-1.0, -101.0, -1.0]], dtype=dtype).requires_grad_()
    old_logp = torch.tensor([[-101.0, -1.0, -1.0]], dtype=dtype)
    loss = raft_loss(logp, old_logp, torch.ones(1), num_items=1)
    assert float(loss.detach()) == pytest.approx(-2.2)
    loss.backward()
    assert logp.grad[0, 0] == 0
    assert abs(float(logp.grad[0, 1])) < 1e-40
    assert logp.grad[0, 2] == -1


def test_compiles():
    def run(logp, old_logp, reward, mask, weight):
        return raft_loss(logp, old_logp, reward, mask=mask, prompt_weight=weight)

    torch._dynamo.reset()
    logp, old_logp, _, mask = batch()
    arguments = (logp, old_logp, REWARD, mask, WEIGHT)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


def test_items():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]])
    items = [int(aggregation_items(mask, how)) for how in AGGREGATIONS]
    assert items == [3, 2, 2, 3, 3, 3]
    with pytest.raises(ValueError, match="aggregation_items: aggregation must be one of token-m"):
        aggregation_items(mask, "mean")
    with pytest.raises(ValueError, match=r"aggregation_items: mask must be \[B, T\]"):
        aggregation_items(mask[0], "dapo")


def test_prompt_weights():
    group = torch.tensor([2, 0, 2, 2, 0])
    counts, rate = torch.tensor([4, 0, 8]), torch.tensor([0.5, 0.0, 0.25])
    accepted = torch.tensor([True, True, False, True, True])
    weights = prompt_weights(group, counts=counts, accept_rate=rate)
    assert weights.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5]
    assert prompt_weights(group, "algorithm1").tolist() == pytest.approx(
        [1 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 2]
    )
    by_prompt = prompt_weights(group, "algorithm1", accepted=accepted)
    assert by_prompt.tolist() == [0.5, 0.5, 0, 0.5, 0.5]
    assert prompt_weights(group, "token_mean").tolist() == [1] * 5
    # A prompt with no accepted response has no weight, and needs no rate.
    unknown = prompt_weights(
        torch.tensor([1, 0]), counts=counts, accept_rate=rate, accepted=accepted[1:3].flip(0)
    )
    assert unknown.tolist() == [0, 0.5]
    assert prompt_weights(torch.zeros(0, dtype=torch.int64), "algorithm1").shape == (0,)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weighting": "lemma2"}, ValueError, "weighting must be one of lemma1, algorithm1"),
        ({"group": torch.ones(2)}, TypeError, "group must be an integer tensor"),
        ({"group": torch.ones(2, 1).long()}, ValueError, r"group must be \[B\]"),
        ({"counts": None}, ValueError, "'lemma1' needs counts"),
        ({"accept_rate": None}, ValueError, "'lemma1' needs accept_rate"),
        ({"counts": torch.ones(3).int()}, ValueError, "accept_rate has shape"),
        ({"counts": torch.ones(2)}, TypeError, "counts must be an integer tensor"),
        ({"group": torch.tensor([0, 2])}, ValueError, "group runs from 0 to 2"),
        ({"group": torch.tensor([-1, 0])}, ValueError, "group runs from -1 to 0"),
        ({"accept_rate": torch.tensor([0.5, 0])}, ValueError, "prompt 1 has an accepted response"),
        ({"counts": torch.tensor([0, 2])}, ValueError, "prompt 0 has an accepted response"),
    ],
)
def test_bad_prompt_weights(kwargs, error, message):
    arguments = {
        "group": torch.tensor([0, 1]),
        "counts": torch.tensor([2, 2]),
        "accept_rate": torch.tensor([0.5, 1.0]),
        **kwargs,
    }
    with pytest.raises(error, match=f"prompt_weights: {message}"):
        prompt_weights(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"logp": torch.zeros(3)}, ValueError, r"logp must be \[B, T\]"),
        ({"logp": torch.zeros(2, 3).long()}, TypeError, "logp must be a floating"),
        ({"old_logp": torch.zeros(3, 2)}, ValueError, r"old_logp has shape \[3, 2\]"),
        ({"reward": torch.zeros(3)}, ValueError, r"reward has shape \[3\], expected \[2\]"),
        ({"reward": torch.ones(2).bool()}, TypeError, "reward must be a floating"),
        ({"prompt_weight": torch.ones(2, 3)}, ValueError, "prompt_weight has shape"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool or integer"),
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of token-mean, dapo"),
        ({"clip_low": -0.1}, ValueError, "clip_low must be 0 or more"),
        ({"clip_high": math.nan}, ValueError, "clip_high must be 0 or more"),
        ({"max_length": 0}, ValueError, "max_length must be 1 token or more"),
        ({"num_items": -1}, ValueError, "num_items must not be negative"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    arguments = {
        "logp": torch.zeros(2, 3),
        "old_logp": torch.zeros(2, 3),
        "reward": torch.zeros(2),
        **kwargs,
    }
    with pytest.raises(error, match=f"raft_loss: {message}"):
        raft_loss(**arguments)


def test_through_the_head_on_policy_ratios_are_exactly_one():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 16, generator=generator)
    head = torch.randn(37, 16, generator=generator)
    labels = torch.randint(37, (4, 5), generator=generator)
    labels[:, 0] = labels[2, 3:] = -100
    with torch.no_grad():
        old_logp = -linear_nll(hidden, head, labels)
    head.requires_grad_()
    logp = -linear_nll(hidden, head, labels)
    options = {"mask": labels != -100, "aggregation": "seq-mean-token-mean"}
    reward = torch.tensor([1.0, 0.0, 0.5, 2.0])
    loss = raft_loss(logp, old_logp, reward, **options)
    assert torch.equal(loss, raft_loss(torch.ones_like(logp), None, reward, **options))
    plain = raft_loss(
        -linear_nll(hidden, head, labels, backend="reference"), None, reward, **options
    )
    (gradient,), (expected,) = (torch.autograd.grad(x, head) for x in (loss, plain))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
