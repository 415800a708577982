"""Attention with a tangent in eager PyTorch: any dtype, any device. It stores the scores."""

import torch
from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype, without_autocast


def attention_jvp(
    q: Tensor,  # [B, heads, T, D]
    k: Tensor,  # [B, kv_heads, T, D]
    v: Tensor,  # [B, kv_heads, T, Dv]
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    key_mask: Tensor | None,  # [B, T]
    cu_seqlens: Tensor | None,  # [S + 1]
    causal: bool,
    scale: float,
    softcap: float,  # 0: none
    window: int,  # 0: none
) -> tuple[Tensor, Tensor]:
    visible = visible_keys(q.shape[2], key_mask, cu_seqlens, causal, window, q.device)
    return dense_attention_jvp(q, k, v, dq, dk, dv, visible, None, scale, softcap)


def visible_keys(
    length: int,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """Which keys each query sees: bool [B or 1, 1, T, T]."""
    index = torch.arange(length, device=device)
    distance = index[:, None] - index
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        visible = visible & (distance < window)
    if cu_seqlens is not None:
        segment = torch.bucketize(index, cu_seqlens[1:].to(index.dtype), right=True)
        visible = visible & (segment[:, None] == segment)
    visible = visible[None, None]
    return visible if key_mask is None else visible & key_mask.bool()[:, None, None, :]


def dense_attention_jvp(
    q: Tensor,  # [B, heads, Tq, D]
    k: Tensor,  # [B, kv_heads, Tk, D]
    v: Tensor,  # [B, kv_heads, Tk, Dv]
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    visible: Tensor | None,  # bool, broadcasts to [B, heads, Tq, Tk]
    bias: Tensor | None,  # added to the scores, broadcasts likewise
    scale: float,
    softcap: float,  # 0: none
) -> tuple[Tensor, Tensor]:
    """Attention under any mask, and its tangent; queries and keys may differ in number."""
    acc, groups = statistics_dtype(q.dtype), q.shape[1] // k.shape[1]

    def wide(x: Tensor) -> Tensor:
        x = x.to(acc)
        return x if x.shape[1] == q.shape[1] else x.repeat_interleave(groups, 1)

    with without_autocast(q.device.type):
        queries, keys, values = wide(q), wide(k), wide(v)
        scores = scale * (queries @ keys.mT)
        d_scores = torch.zeros_like(scores)
        if dq is not None:
            d_scores = d_scores + wide(dq) @ keys.mT
        if dk is not None:
            d_scores = d_scores + queries @ wide(dk).mT
        d_scores = d_scores * scale
        if softcap:
            capped = torch.tanh(scores / softcap)
            scores, d_scores = softcap * capped, d_scores * (1 - capped * capped)
        if bias is not None:
            scores = scores + bias
        hidden = scores == -torch.inf
        if visible is not None:
            hidden = hidden | ~visible
        scores = scores.masked_fill(hidden, -torch.inf)
        d_scores = d_scores.masked_fill(hidden, 0)
        blind = hidden.all(-1, keepdim=True)  # [B, heads, Tq, 1]
        p = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
        dp = p * (d_scores - (p * d_scores).sum(-1, keepdim=True))
        out, dout = p @ values, dp @ values
        if dv is not None:
            dout = dout + p @ wide(dv)
    return out.to(q.dtype), dout.to(q.dtype)
