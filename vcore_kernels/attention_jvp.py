"""Attention and its forward-mode derivative, in one sweep and without the T x T scores."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vcore_kernels._head import autocast_to
from vcore_kernels._library import define, no_derivative
from vcore_kernels.backends import reference_attention, resolve, triton
from vcore_kernels.segments import check_offsets
from vcore_kernels.spans import spanned


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    """[B, heads, T, Dv] that lies as [B, T, heads, Dv], as the output projection reads it."""
    batch, heads, length, _ = q.shape
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)


def _fake(q, k, v, *_):
    return _empty_output(q, v), _empty_output(q, v)


define(
    "attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv,"
    " Tensor? key_mask, Tensor? cu_seqlens, bool causal, float scale, float softcap, int window)"
    " -> (Tensor out, Tensor dout)",
    _fake,
)
no_derivative("attention_jvp")
triton.implement("attention_jvp", "attention_jvp")


@spanned
def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    *,
    causal: bool,
    scale: float,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q @ k.T) @ v`` and its derivative along (dq, dk, dv).

    With P the softmax and ``dS = scale * (dq @ k.T + q @ dk.T)``, the tangent is ``(P * dS) @ v +
    P @ dv - rowsum(P * dS) * out``. Maximum, normaliser and all sums accumulate online: memory
    grows with T, not with its square (the reference backend stores the scores). Products and sums
    are in float32 (float64 for float64). A query that sees no key has output and tangent 0. No
    gradient flows through the result.

    Args:
        q: [B, heads, T, D], or packed [heads, N, D] with ``cu_seqlens``.
        k: [B, kv_heads, T, D] or [kv_heads, N, D]; ``heads`` is a multiple of ``kv_heads``, and
            head h reads key head ``h // (heads // kv_heads)``.
        v: like ``k``, its last dimension may differ.
        dq, dk, dv: tangents shaped like q, k, v, cast to their dtype; None is zero, and saves its
            products.
        causal: query i sees keys j <= i.
        scale: factor on the scores, usually ``D ** -0.5``.
        key_mask: bool or integer [B, T], keys that may be seen where not 0: padding on either side.
        cu_seqlens: int32 [S + 1] from 0 to N; a query sees keys of its own segment alone. Not read
            on the host by the Triton backend.
        window: a query sees keys with ``0 <= i - j < window``; needs ``causal``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        backend: "auto", "reference", "cpp" or "triton".

    Returns:
        (out, dout), shaped like q but for v's last dimension, in its dtype. Under autocast, q, k
        and v are taken in its dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        BackendError: the named backend cannot serve the call.

    Source: forward-mode derivative of online softmax attention (Dao et al., arXiv 2205.14135);
    docs/design.md.
    """
    primals = [autocast_to(x, q.device.type) for x in (q, k, v)]
    tangents = [dq, dk, dv]
    _check(primals, tangents, key_mask, cu_seqlens, causal, scale, window, softcap)
    tangents = [
        None if dx is None else dx.to(x.dtype) for x, dx in zip(primals, tangents, strict=True)
    ]
    if cu_seqlens is not None:
        primals = [x.unsqueeze(0) for x in primals]
        tangents = [None if dx is None else dx.unsqueeze(0) for dx in tangents]
        cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    if key_mask is not None and key_mask.dtype != torch.bool:
        key_mask = key_mask != 0
    given = [x for x in (*primals, *tangents) if x is not None]
    call: Callable[..., tuple[Tensor, Tensor]] = torch.ops.vcore_kernels.attention_jvp
    if resolve("attention_jvp", backend, *given) == "reference":
        call = reference_attention.attention_jvp
    with torch.no_grad():
        out, dout = call(
            *primals,
            *tangents,
            key_mask,
            cu_seqlens,
            causal,
            float(scale),
            softcap or 0.0,
            window or 0,
        )
    return (out, dout) if cu_seqlens is None else (out[0], dout[0])


def _check(primals, tangents, key_mask, cu_seqlens, causal, scale, window, softcap) -> None:
    q, k, v = primals
    dims, layout = (4, "[B, heads, T, D]") if cu_seqlens is None else (3, "[heads, N, D]")
    if any(x.dim() != dims for x in primals):
        extra = "" if cu_seqlens is not None else " (packed [heads, N, D] goes with cu_seqlens)"
        raise ValueError(
            f"attention_jvp: expected q, k, v as {layout}, got {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}{extra}."
        )
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-3] != k.shape[:-3] or q.shape[-2] != k.shape[-2]:
        raise ValueError(
            f"attention_jvp: q, k, v differ in batch, length or key heads: {list(q.shape)}, "
            f"{list(k.shape)}, {list(v.shape)}. Queries and keys are of the same tokens."
        )
    if q.shape[-1] != k.shape[-1] or kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"attention_jvp: q {list(q.shape)} does not go with k {list(k.shape)}: D must be the "
            "same and the number of heads a multiple of k's."
        )
    for name, x, dx in zip("qkv", primals, tangents, strict=True):
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise TypeError(
                f"attention_jvp: q, k and v must share a floating-point dtype, got {q.dtype}, "
                f"{k.dtype}, {v.dtype}. Cast them, or run under torch.autocast."
            )
        if x.device != q.device:
            raise ValueError(f"attention_jvp: {name} is on {x.device}, q on {q.device}.")
        if dx is None:
            continue
        if dx.shape != x.shape or dx.device != x.device or not dx.is_floating_point():
            raise ValueError(
                f"attention_jvp: d{name} is {dx.dtype} {list(dx.shape)} on {dx.device}, {name} is "
                f"{x.dtype} {list(x.shape)} on {x.device}. Pass a tangent like {name}, or None."
            )
    if not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(
            f"attention_jvp: scale must be a number, got {type(scale).__name__}. Usual is D**-0.5."
        )
    if not -math.inf < scale < math.inf:
        raise ValueError(f"attention_jvp: scale must be finite, got {scale}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"attention_jvp: softcap must be positive or None, got {softcap}.")
    if window is not None and not isinstance(window, (int, torch.SymInt)):
        raise TypeError(
            f"attention_jvp: window must be a whole number or None, got {type(window).__name__}."
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"attention_jvp: window must be 1 or more and needs causal=True, got window={window}, "
            f"causal={causal}."
        )
    if key_mask is not None:
        if cu_seqlens is not None:
            raise ValueError(
                "attention_jvp: key_mask does not go with cu_seqlens. Leave padding out of a "
                "packed batch."
            )
        if key_mask.is_floating_point() or key_mask.shape != (q.shape[0], q.shape[2]):
            raise ValueError(
                f"attention_jvp: key_mask must be bool or integer [{q.shape[0]}, {q.shape[2]}], "
                f"got {key_mask.dtype} {list(key_mask.shape)}."
            )
        if key_mask.device != q.device:
            raise ValueError(f"attention_jvp: key_mask is on {key_mask.device}, q on {q.device}.")
    if cu_seqlens is not None:
        check_offsets("attention_jvp", cu_seqlens, q, q.shape[1])
