import math

import pytest
import torch
from policy_formulas import AGGREGATIONS, aggregated, batch, clipped, k3

from vcore_kernels import group_metrics, grpo_advantages, grpo_loss

ADVANTAGE = torch.tensor([1.3, -0.7, -2.0, 0.0, 1.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 3.0, 1.0, 1.0], dtype=torch.float64)
each_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
OPTIONS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.3},
    {"beta": 0.4, "dual_clip": 3.0},
    {"beta": 0.4, "kl_clamp": 0.05, "prompt_weight": WEIGHT, "num_items": 7},
]


@each_aggregation
@pytest.mark.parametrize("options", OPTIONS)
def test_token_by_token(aggregation, options):
    logp, old_logp, ref_logp, mask = batch()
    loss = grpo_loss(
        logp, old_logp, ADVANTAGE, ref_logp=ref_logp, mask=mask, aggregation=aggregation, **options
    )
    low, high = options.get("clip_low", 0.2), options.get("clip_high", 0.2)
    losses = [
        [
            clipped(math.exp(new - old), a, low, high, options.get("dual_clip"))
            + options.get("beta", 0.0) * k3(new, ref, options.get("kl_clamp"))
            for new, old, ref in zip(*rows, strict=True)
        ]
        for a, *rows in zip(
            ADVANTAGE.tolist(), logp.tolist(), old_logp.tolist(), ref_logp.tolist(), strict=True
        )
    ]
    weight = options.get("prompt_weight")
    weight = None if weight is None else weight.tolist()
    truth = aggregated(losses, mask.tolist(), aggregation, weight, options.get("num_items"))
    assert float(loss.detach()) == pytest.approx(truth, rel=1e-12)


@each_aggregation
@pytest.mark.parametrize("options", OPTIONS)
def test_gradient(aggregation, options):
    logp, old_logp, ref_logp, mask = batch(3, 4)
    options = {**options, "prompt_weight": WEIGHT[:3]}

    def run(logp):
        return grpo_loss(
            logp, old_logp, ADVANTAGE[:3], ref_logp=ref_logp, mask=mask, aggregation=aggregation,
            **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, logp)


def test_on_policy():
    logp, _, _, mask = batch(dtype=torch.float32)
    advantage = ADVANTAGE.float()
    loss = grpo_loss(logp, logp.detach(), advantage, mask=mask, dual_clip=3.0)
    expected = -(advantage.unsqueeze(1) * mask).sum() / mask.sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(gradient, -(advantage.unsqueeze(1) * mask) / mask.sum())
    alone = grpo_loss(logp, None, advantage, mask=mask, dual_clip=3.0)
    assert torch.equal(alone, loss)
    assert torch.equal(torch.autograd.grad(alone, logp)[0], gradient)


def test_a_reference_equal_to_the_policy_costs_nothing():
    logp, old_logp, _, mask = batch(dtype=torch.float32)
    advantage = ADVANTAGE.float()
    with_kl = grpo_loss(logp, old_logp, advantage, ref_logp=logp.detach(), beta=0.5, mask=mask)
    without = grpo_loss(logp, old_logp, advantage, mask=mask)
    assert torch.equal(with_kl, without)
    assert torch.equal(*(torch.autograd.grad(x, logp)[0] for x in (with_kl, without)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("difference", [100.0, -100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("kl_clamp", [None, 10.0])
def test_extreme_ratios(dtype, difference, advantage, kl_clamp):
    logp = torch.full((1, 1), -200.0, dtype=dtype).requires_grad_()
    old_logp = logp.detach() - difference
    advantage = torch.tensor([advantage])
    loss = grpo_loss(logp, old_logp, advantage, dual_clip=3.0)
    ratio = {(1, True): 1.2, (1, False): 0, (-1, True): 3, (-1, False): 0.8}
    expected = -advantage * ratio.get((int(advantage), difference > 0), 0)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6, abs=1e-40)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.abs() < 1e-40
    # Without the dual clip a ratio has no bound where the advantage is negative: still finite.
    loss = grpo_loss(logp, old_logp, advantage, ref_logp=old_logp, beta=0.1, kl_clamp=kl_clamp)
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.isfinite().all()


@each_aggregation
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_what_does_not_count_may_hold_anything(aggregation, beta):
    logp, old_logp, ref_logp, mask = batch()
    hostile = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0], dtype=logp.dtype)
    weight = WEIGHT.clone()
    weight[1] = 0
    counts = mask & ((weight != 0) & ((ADVANTAGE != 0) | (beta > 0))).unsqueeze(1)
    results = []
    for fill in (torch.zeros_like(logp), hostile.expand(5, 6)):
        new, old, ref = (
            torch.where(counts, x.detach(), fill.roll(i, 1))
            for i, x in enumerate((logp, old_logp, ref_logp))
        )
        new.requires_grad_()
        advantage = ADVANTAGE.clone()
        advantage[4] = fill[0, 0]
        loss = grpo_loss(
            new, old, advantage, ref_logp=ref, beta=beta, mask=mask, prompt_weight=weight,
            aggregation=aggregation, dual_clip=3.0, kl_clamp=10.0,
        )  # fmt: skip
        loss.backward()
        results.append((loss.detach(), new.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not results[0][1][~counts].any()


@each_aggregation
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 4)])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_nothing_supervised_is_a_connected_zero(aggregation, shape, beta):
    logp = torch.full(shape, math.nan).requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    advantage = torch.full(shape[:1], math.nan)
    options = {"mask": mask, "aggregation": aggregation, "ref_logp": logp.detach(), "beta": beta}
    loss = grpo_loss(logp, logp.detach(), advantage, **options)
    assert loss == 0
    loss.backward()
    assert torch.equal(logp.grad, torch.zeros(shape))


def test_dtypes():
    logp, old_logp, ref_logp, mask = batch()
    half = [x.detach().bfloat16() for x in (logp, old_logp, ref_logp)]
    new = half[0].requires_grad_()
    options = {"mask": mask, "beta": 0.1}
    loss = grpo_loss(new, half[1], ADVANTAGE.float(), ref_logp=half[2], **options)
    assert loss.dtype == torch.float32
    truth = grpo_loss(new.double(), half[1], ADVANTAGE.float(), ref_logp=half[2], **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-7)


def test_compiles():
    def run(logp, old_logp, ref_logp, advantage, mask):
        return grpo_loss(
            logp, old_logp, advantage, ref_logp=ref_logp, beta=0.1, dual_clip=3.0, mask=mask
        )

    torch._dynamo.reset()
    logp, old_logp, ref_logp, mask = batch()
    arguments = (logp, old_logp, ref_logp, ADVANTAGE, mask)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    reward = torch.tensor([1.0, 0.0, 0.3, 1.0, 0.5, 0.1, 0.1, 0.1, 2.0], dtype=torch.float64)
    group = torch.tensor([7, -3, 7, 7, 1000, 4, 4, 4, -3])
    advantage = grpo_advantages(reward, group, scale=scale, eps=1e-3)
    deviation = torch.zeros_like(reward)
    std = torch.ones_like(reward)
    for prompt in group.unique():
        rows = group == prompt
        deviation[rows] = reward[rows] - reward[rows].mean()
        if rows.sum() > 1:
            std[rows] = reward[rows].std()
    std = {"group": std + 1e-3, "batch": reward.std() + 1e-3, "none": 1}[scale]
    torch.testing.assert_close(advantage, deviation / std, rtol=1e-12, atol=1e-12)
    assert not advantage[4:8].any()  # alone, and equal: exactly 0
    assert group_metrics(reward, group) == (4, 1, 1)


def test_advantages_at_the_edges():
    empty = grpo_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert empty.shape == (0,)
    assert group_metrics(torch.zeros(0), torch.zeros(0, dtype=torch.int64)) == (0, 0, 0)
    for scale in ("group", "batch", "none"):
        assert grpo_advantages(torch.ones(1), torch.tensor([3]), scale=scale) == 0
        pair = grpo_advantages(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), scale=scale, eps=0)
        assert pair.tolist() == pytest.approx(
            [0.5, -0.5] if scale == "none" else [0.5**0.5, -(0.5**0.5)]
        )
        equal = grpo_advantages(torch.full((3,), 0.1), torch.zeros(3).int(), scale=scale, eps=0)
        assert equal.tolist() == [0, 0, 0]
    assert grpo_advantages(torch.ones(2).bfloat16(), torch.tensor([0, 1])).dtype == torch.float32


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"scale": "std"}, ValueError, "scale must be 'group', 'batch' or 'none'"),
        ({"eps": -1.0}, ValueError, "eps must be finite"),
        ({"reward": torch.ones(2, 1)}, ValueError, r"reward must be \[B\]"),
        ({"reward": torch.tensor([1.0, math.nan])}, ValueError, r"reward\[1\] is nan"),
        ({"reward": torch.ones(2).long()}, TypeError, "reward must be a floating"),
        ({"group": torch.ones(2)}, TypeError, "group must be an integer tensor"),
        ({"group": torch.ones(3).long()}, ValueError, r"group has shape \[3\]"),
    ],
)
def test_bad_advantages(kwargs, error, message):
    arguments = {"reward": torch.ones(2), "group": torch.zeros(2).long(), **kwargs}
    with pytest.raises(error, match=f"grpo_advantages: {message}"):
        grpo_advantages(**arguments)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"beta": 0.1}, ValueError, "beta is 0.1. Pass ref_logp"),
        ({"beta": -0.1}, ValueError, "beta must be finite and not negative"),
        ({"ref_logp": torch.zeros(2)}, ValueError, r"ref_logp has shape \[2\]"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip must be more than 1"),
        ({"kl_clamp": 0.0}, ValueError, "kl_clamp must be positive"),
        ({"clip_low": -1.0}, ValueError, "clip_low must be 0 or more"),
        ({"advantage": torch.zeros(2, 3)}, ValueError, r"advantage has shape \[2, 3\]"),
        ({"aggregation": "sum"}, ValueError, "aggregation must be one of"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    arguments = {
        "logp": torch.zeros(2, 3),
        "old_logp": torch.zeros(2, 3),
        "advantage": torch.zeros(2),
        **kwargs,
    }
    with pytest.raises(error, match=f"grpo_loss: {message}"):
        grpo_loss(**arguments)
