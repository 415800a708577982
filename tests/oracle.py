"""The truth in float64, written the textbook way and sharing no code with the library."""

import torch
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------- linear
# head


def head_logits(hidden, weight, bias=None, softcap=None, scale=1.0):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def head_nll(hidden, weight, target, bias=None, softcap=None, scale=1.0, ignore_index=-100):
    """Cross-entropy per row in the dtype of the inputs; what eager PyTorch computes."""
    logits = head_logits(hidden, weight, bias, softcap, scale)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if target.numel() == 0:
        return logits.sum(-1)
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")


def max_error(value, truth):
    assert value.shape == truth.shape, (value.shape, truth.shape)
    return (value.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_as_good_as_eager(value, truth, eager, dtype, what="", scale=None):
    """docs/design.md: at most twice eager's error in the same dtype, plus eps(dtype) * scale.

    In float64 eager is the truth itself, so there the bound is some roundings. ``scale`` is the
    size of the terms that the value is a difference of; without it, that of the value.
    """
    assert torch.isfinite(value).all(), f"{what}: not finite"
    if scale is None:
        scale = truth.abs().max().item() if truth.numel() else 0.0
    roundings = 64 if dtype == torch.float64 else 1
    bound = 2 * max_error(eager, truth) + roundings * torch.finfo(dtype).eps * scale
    error = max_error(value, truth)
    assert error <= bound, f"{what}: error {error:.3e} above {bound:.3e} (scale {scale:.3e})"


# ---------------------------------------------------------------------------------------- attention


def attention(q, k, v, visible, scale, softcap=None):
    """[B, heads, T, D]; ``visible`` bool [B, 1, T, T]. A query that sees no key has output 0."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ keys.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, -torch.inf)
    blind = ~visible.any(-1, keepdim=True)
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    p = scores.masked_fill(blind, 0).softmax(-1, dtype=statistics).to(q.dtype)
    return p.masked_fill(blind, 0) @ values


def visible_keys(length, causal, *, key_mask=None, lengths=None, window=None):
    """The mask of one attention call, entry by entry; ``lengths`` of packed segments."""
    segment = [s for s, n in enumerate(lengths or [length]) for _ in range(n)]
    rows = [None] if key_mask is None else key_mask.tolist()
    return torch.tensor(
        [
            [
                [
                    segment[i] == segment[j]
                    and (not causal or j <= i)
                    and (window is None or 0 <= i - j < window)
                    and (row is None or bool(row[j]))
                    for j in range(length)
                ]
                for i in range(length)
            ]
            for row in rows
        ],
        device="cpu",
    ).reshape(len(rows), 1, length, length)
