"""Attention and its tangent in one sweep over the keys (Triton kernel)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import architecture, cast, cdiv, dot, expm1, launch, precision

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(p_x, i_rows, n_rows, o_column, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``i_rows`` of [n_rows, WIDTH], BLOCK columns from ``o_column``; 0 outside."""
    i_columns = o_column + tl.arange(0, BLOCK)
    offsets = i_rows.to(tl.int64)[:, None] * stride + i_columns[None, :]
    mask = i_rows[:, None] < n_rows
    if WIDTH == 0 or WIDTH % BLOCK != 0:
        mask = mask & (i_columns[None, :] < WIDTH)
    return tl.load(p_x + offsets, mask=mask, other=0.0)


@triton.jit
def _sweep(
    acc,  # [ROWS, BLOCK_DV] sum of exp(s - top) v
    dacc,  # [ROWS, BLOCK_DV] sum of exp(s - top) ((ds - mean) v + dv)
    top,  # [ROWS] largest score so far, in units of log 2
    total,  # [ROWS] sum of exp(s - top)
    mean,  # [ROWS] softmax mean of ds
    q,
    dq,
    p_k,
    p_dk,
    p_v,
    p_dv,
    p_key_mask,
    first,  # [ROWS] first key that each row may see
    end,  # [ROWS] and the end
    begin,
    stop,
    o_value,  # first column of v that this program takes
    T,
    s_k,
    s_v,
    scale,
    softcap,
    MASKED: tl.constexpr,
    HAS_DQ: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes the keys from ``begin`` to ``stop``, a tile at a time. MASKED: ``first``, ``end`` and
    the key mask count; otherwise every row sees every key."""
    TANGENT: tl.constexpr = HAS_DQ or p_dk is not None
    for o_key in range(begin, stop, KEYS):
        i_keys = o_key + tl.arange(0, KEYS)
        k = _load_rows(p_k, i_keys, T, 0, s_k, D, BLOCK_D)
        zero = tl.zeros([ROWS, KEYS], tl.float32)
        s = dot(q, tl.trans(k), zero, PRECISION) * scale
        ds = zero
        if HAS_DQ:
            ds = dot(dq, tl.trans(k), ds, PRECISION)
        if p_dk is not None:
            dk = _load_rows(p_dk, i_keys, T, 0, s_k, D, BLOCK_D)
            ds = dot(q, tl.trans(dk), ds, PRECISION)
        if TANGENT:
            ds *= scale
        if SOFTCAP:
            e = expm1(-2.0 * tl.abs(s / softcap))
            t = e / (2.0 + e)  # -tanh(|s| / softcap)
            s = tl.where(s < 0, t, -t) * softcap
            if TANGENT:
                ds *= 1.0 - t * t
        s *= _LOG2_E
        if MASKED:
            visible = (i_keys[None, :] >= first[:, None]) & (i_keys[None, :] < end[:, None])
            if p_key_mask is not None:
                seen = tl.load(p_key_mask + i_keys, mask=i_keys < T, other=0) != 0
                visible = visible & seen[None, :]
            s = tl.where(visible, s, float("-inf"))
            if TANGENT:
                ds = tl.where(visible, ds, 0.0)

        new_top = tl.maximum(top, tl.max(s, 1))
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet
        p = tl.exp2(s - reference[:, None])
        rescale = tl.exp2(top - reference)
        total *= rescale
        new_total = total + tl.sum(p, 1)
        acc *= rescale[:, None]
        dacc *= rescale[:, None]
        if TANGENT:
            # dacc is relative to the running mean of ds, so that dp is no larger than it must be.
            moment = total * mean + tl.sum(p * ds, 1)
            new_mean = moment / tl.where(new_total == 0, 1.0, new_total)
            dacc += (mean - new_mean)[:, None] * acc
            dp = p * (ds - new_mean[:, None])
            mean = new_mean
        top, total = new_top, new_total

        v = _load_rows(p_v, i_keys, T, o_value, s_v, DV, BLOCK_DV)
        p = cast(p, v.dtype)
        acc = dot(p, v, acc, PRECISION)
        if TANGENT:
            dacc = dot(cast(dp, v.dtype), v, dacc, PRECISION)
        if p_dv is not None:
            dv = _load_rows(p_dv, i_keys, T, o_value, s_v, DV, BLOCK_DV)
            dacc = dot(p, dv, dacc, PRECISION)
    return acc, dacc, top, total, mean


@triton.jit(launch_metadata=costs.attention)
def _attention(
    p_q,  # [B, heads, T, D]; the last dimension is contiguous everywhere
    p_dq,  # strides of p_q; None: 0
    p_k,  # [B, kv_heads, T, D]
    p_dk,
    p_v,  # [B, kv_heads, T, DV]
    p_dv,
    p_out,  # [B, heads, T, DV]
    p_dout,
    p_key_mask,  # [B, T] uint8 or None
    p_first,  # [T] int32: first key of each token's segment, or None
    p_end,  # [T] int32: and the end
    T,
    heads,
    shared,  # query heads for each key head
    sb_q,
    sh_q,
    st_q,
    sb_k,
    sh_k,
    st_k,
    sb_v,
    sh_v,
    st_v,
    sb_o,
    sh_o,
    st_o,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = softmax(S) V and dout = (P * (dS - rowsum(P * dS))) V + P dV, where S = softcap(scale Q
    K') and dS its tangent along (dQ, dK).

    Grid: a program for each ROWS queries of each head, those with most keys first, and BLOCK_DV
    columns of V. Scores, sums and
    accumulators are float32; P and P * dS are rounded to the dtype of V for the products. A block
    of packed queries may span segments: each row has its own range of keys.
    """
    n_blocks = tl.cdiv(T, ROWS)
    PARTS: tl.constexpr = (DV + BLOCK_DV - 1) // BLOCK_DV
    i_program = tl.program_id(0) // PARTS
    o_value = tl.program_id(0) % PARTS * BLOCK_DV
    i_block = n_blocks - 1 - i_program % n_blocks
    i_batch = (i_program // n_blocks // heads).to(tl.int64)
    i_head = (i_program // n_blocks % heads).to(tl.int64)
    i_kv = i_head // shared
    o_row = i_block * ROWS
    i_rows = o_row + tl.arange(0, ROWS)

    o_q = i_batch * sb_q + i_head * sh_q
    q = _load_rows(p_q + o_q, i_rows, T, 0, st_q, D, BLOCK_D)
    dq = q
    if p_dq is not None:
        dq = _load_rows(p_dq + o_q, i_rows, T, 0, st_q, D, BLOCK_D)
    o_k = i_batch * sb_k + i_kv * sh_k
    o_v = i_batch * sb_v + i_kv * sh_v
    if p_key_mask is not None:
        p_key_mask += i_batch * T
    if p_dk is not None:
        p_dk += o_k
    if p_dv is not None:
        p_dv += o_v

    last_row = tl.minimum(o_row + ROWS, T) - 1
    begin = 0
    stop = T
    if CAUSAL:
        stop = last_row + 1
    first = tl.zeros([ROWS], tl.int32)
    end = tl.zeros([ROWS], tl.int32) + T
    if p_first is not None:
        first = tl.load(p_first + i_rows, mask=i_rows < T, other=0)
        end = tl.load(p_end + i_rows, mask=i_rows < T, other=0)
        begin = tl.load(p_first + o_row)
        stop = tl.minimum(stop, tl.load(p_end + last_row))
    if CAUSAL:
        end = tl.minimum(end, i_rows + 1)
    if WINDOW:
        first = tl.maximum(first, i_rows - window + 1)
        begin = tl.maximum(begin, o_row - window + 1)
    begin = begin // KEYS * KEYS

    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    dacc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    # Tiles that every row sees whole need no mask: all but those on the diagonal and the last.
    if not WINDOW and p_first is None and p_key_mask is None:
        whole = T // KEYS * KEYS
        if CAUSAL:
            whole = o_row // KEYS * KEYS
        acc, dacc, top, total, mean = _sweep(
            acc,
            dacc,
            top,
            total,
            mean,
            q,
            dq,
            p_k + o_k,
            p_dk,
            p_v + o_v,
            p_dv,
            p_key_mask,
            first,
            end,
            0,
            whole,
            o_value,
            T,
            st_k,
            st_v,
            scale,
            softcap,
            False,
            p_dq is not None,
            D,
            DV,
            ROWS,
            KEYS,
            BLOCK_D,
            BLOCK_DV,
            SOFTCAP,
            PRECISION,
        )
        begin = whole
    acc, dacc, top, total, mean = _sweep(
        acc,
        dacc,
        top,
        total,
        mean,
        q,
        dq,
        p_k + o_k,
        p_dk,
        p_v + o_v,
        p_dv,
        p_key_mask,
        first,
        end,
        begin,
        stop,
        o_value,
        T,
        st_k,
        st_v,
        scale,
        softcap,
        True,
        p_dq is not None,
        D,
        DV,
        ROWS,
        KEYS,
        BLOCK_D,
        BLOCK_DV,
        SOFTCAP,
        PRECISION,
    )

    factor = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    i_columns = o_value + tl.arange(0, BLOCK_DV)
    o_out = i_batch * sb_o + i_head * sh_o
    offsets = o_out + i_rows.to(tl.int64)[:, None] * st_o + i_columns[None, :]
    m_out = (i_rows[:, None] < T) & (i_columns[None, :] < DV)
    dtype = p_out.dtype.element_ty
    tl.store(p_out + offsets, cast(acc * factor[:, None], dtype), mask=m_out)
    tl.store(p_dout + offsets, cast(dacc * factor[:, None], dtype), mask=m_out)


def attention_jvp(
    q: Tensor,  # [B, heads, T, D]
    k: Tensor,  # [B, kv_heads, T, D]
    v: Tensor,  # [B, kv_heads, T, DV]
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    key_mask: Tensor | None,  # bool [B, T]
    cu_seqlens: Tensor | None,  # int32 [S + 1]
    causal: bool,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """As ``vcore_kernels::attention_jvp``; nothing is read back from the device."""
    batch, heads, length, width = q.shape
    value_width = v.shape[3]
    q, dq = _same_layout(q, dq)
    k, dk = _same_layout(k, dk)
    v, dv = _same_layout(v, dv)
    out, dout = (q.new_empty(batch, length, heads, value_width).transpose(1, 2) for _ in range(2))
    first = end = None
    if cu_seqlens is not None:
        tokens = torch.arange(length, device=q.device, dtype=torch.int32)
        segment = torch.bucketize(tokens, cu_seqlens[1:], right=True)
        segment = segment.clamp_max(cu_seqlens.shape[0] - 2)
        first, end = cu_seqlens[segment], cu_seqlens[segment + 1]
    block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (width, value_width))
    tile = tuning.attention_tile(architecture(q.device), q.dtype, max(block_d, block_dv))
    block_dv = min(block_dv, tile.values)
    launch(
        _attention,
        [cdiv(length, tile.rows) * batch * heads * cdiv(value_width, block_dv)],
        q,
        dq,
        k,
        dk,
        v,
        dv,
        out,
        dout,
        None if key_mask is None else key_mask.contiguous().view(torch.uint8),
        first,
        end,
        length,
        heads,
        heads // k.shape[1],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        scale,
        softcap or 1.0,
        window,
        D=width,
        DV=value_width,
        ROWS=tile.rows,
        KEYS=tile.keys,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        CAUSAL=causal,
        WINDOW=window > 0,
        SOFTCAP=softcap > 0,
        PRECISION=precision(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, dout


def _same_layout(x: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with the same strides and rows in one piece; copied only where they are not so."""
    if x.stride(3) != 1:
        x = x.contiguous()
    if dx is None or dx.stride() == x.stride():
        return x, dx
    if dx.stride(3) == 1 and dx.is_contiguous():
        return x.contiguous(), dx
    return x.contiguous(), dx.contiguous()
