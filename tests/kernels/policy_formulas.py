"""RAFT, GRPO and the aggregations token by token in Python: what the tests of both compare with."""

import math

import torch

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "dr-grpo",
    "dapo",
)


def clipped(ratio, advantage, low, high, dual=None):
    inside = min(max(ratio, 1 - low), 1 + high)
    loss = max(-advantage * ratio, -advantage * inside)
    return min(loss, -advantage * dual) if dual is not None and advantage < 0 else loss


def k3(logp, ref_logp, most=None):
    kl = math.exp(ref_logp - logp) - (ref_logp - logp) - 1
    return kl if most is None else min(kl, most)


def aggregated(losses, mask, how, weight=None, num_items=None, max_length=None):
    """``losses``: one list a row; ``mask`` likewise."""
    rows = [
        [x for x, kept in zip(row, m, strict=True) if kept]
        for row, m in zip(losses, mask, strict=True)
    ]
    weight = [1.0] * len(rows) if weight is None else weight
    length = max_length or len(mask[0])
    sums = [w * sum(row) for w, row in zip(weight, rows, strict=True)]
    total, tokens = sum(sums), sum(map(len, rows))
    filled = sum(map(bool, rows))
    if how in ("token-mean", "dapo"):
        return total / (num_items or max(tokens, 1))
    if how == "seq-mean-token-sum":
        return total / (num_items or max(filled, 1))
    if how == "seq-mean-token-mean":
        means = [s / len(row) for s, row in zip(sums, rows, strict=True) if row]
        return sum(means) / (num_items or max(filled, 1))
    if how == "seq-mean-token-sum-norm":
        return total / length
    assert how == "dr-grpo"
    return total / ((num_items or len(rows)) * length)


def batch(rows=5, length=6, spread=0.4, seed=0, dtype=torch.float64):
    """logp that needs a gradient, old_logp, ref_logp, mask with an empty and a full row."""
    generator = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(rows, length, generator=generator, dtype=dtype)

    logp = -normal().abs()
    old_logp, ref_logp = logp + spread * normal(), logp + spread * normal()
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[0], mask[-1] = True, False
    return logp.requires_grad_(), old_logp, ref_logp, mask
