"""Products of the logits' gradients: d_hidden = G weight, d_weight = G' hidden, d_bias = G' 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import (
    architecture,
    cast,
    cdiv,
    dot,
    halves,
    launch,
    multiprocessors,
    precision,
)
from vcore_kernels.triton.head_logits import load_tile, operand
from vcore_kernels.triton.head_rows import KEPT_SCALE, Chunk, Work


@triton.jit
def _unscale(x, p_unit, KEPT_SCALE: tl.constexpr):
    """Out of units of p_unit / KEPT_SCALE."""
    if KEPT_SCALE != 1.0:
        x *= 1.0 / KEPT_SCALE
    if p_unit is not None:
        x *= tl.load(p_unit)
    return x


@triton.jit
def _put(
    x,  # [rows, COLUMNS]
    p_out,
    i_rows,
    m_rows,
    o_column,
    H,
    p_unit,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[rows, columns] (+)= x, out of its units, rounded once."""
    x = _unscale(x, p_unit, KEPT_SCALE)
    i_columns = o_column + tl.arange(0, COLUMNS)
    offsets = i_rows.to(tl.int64)[:, None] * H + i_columns[None, :]
    mask = m_rows[:, None] & (i_columns < H)[None, :]
    if ADD:
        x += tl.load(p_out + offsets, mask=mask, other=0.0)
    tl.store(p_out + offsets, cast(x, p_out.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=costs.hidden_gradient)
def _hidden_gradient(
    p_gradient,  # [R, V] of stride s_gradient; a descriptor with TMA
    p_weight,  # [V, H] of stride s_weight; a descriptor with TMA
    p_out,  # [N, H], or with SPLIT float32 [splits, R, H]
    p_order,
    p_counts,
    p_unit,
    V,
    H,
    s_gradient,
    s_weight,
    o_chunk,
    R,
    span,  # vocabulary entries of a split, a multiple of DEPTH
    splits,
    programs,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[token of r] = sum over v of gradient[r, v] * weight[v].

    Grid: ``programs`` persistent ones; a tile of ROWS x COLUMNS of the output at a time. The number
    of rows is read on the device. Accumulated in float32 along V, rounded once. With SPLIT the
    vocabulary is taken in ``splits`` ranges whose sums, not yet out of their units, stay apart.
    """
    count = tl.minimum(tl.load(p_counts) - o_chunk, R)
    row_tiles = tl.cdiv(tl.maximum(count, 0), ROWS)
    column_tiles = tl.cdiv(H, COLUMNS)
    tiles = row_tiles * column_tiles * splits
    half: tl.constexpr = COLUMNS // 2
    for i_tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        o_row = (i_tile % row_tiles) * ROWS
        o_column = (i_tile // row_tiles % column_tiles) * COLUMNS
        i_split = i_tile // (row_tiles * column_tiles)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for v in range(i_split * span, tl.minimum(i_split * span + span, V), DEPTH):
            g = load_tile(p_gradient, s_gradient, o_row, v, R, V, ROWS, DEPTH, TMA)
            w = load_tile(p_weight, s_weight, v, o_column, V, H, DEPTH, COLUMNS, TMA)
            acc = dot(g, w, acc, PRECISION)
        i_rows = o_row + tl.arange(0, ROWS)
        m_rows = i_rows < count
        if SPLIT:
            i_out = i_split * R + i_rows
            unit, kept_scale = None, 1.0
        else:
            i_out = tl.load(p_order + o_chunk + i_rows, mask=m_rows, other=0)
            unit, kept_scale = p_unit, KEPT_SCALE
        if PARTS == 1:
            _put(acc, p_out, i_out, m_rows, o_column, H, unit, False, COLUMNS, kept_scale)
        else:
            left, right = halves(acc, ROWS, COLUMNS)
            _put(left, p_out, i_out, m_rows, o_column, H, unit, False, half, kept_scale)
            o_column += half
            _put(right, p_out, i_out, m_rows, o_column, H, unit, False, half, kept_scale)


@triton.jit(launch_metadata=costs.add_splits)
def _add_splits(
    p_sums,  # float32 [splits, R, H]
    p_out,  # [N, H]
    p_order,
    p_counts,
    p_unit,
    H,
    o_chunk,
    R,
    splits,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[token of r] = the splits' sums added in their order, rounded once.

    Grid: (row tiles, column tiles).
    """
    count = tl.minimum(tl.load(p_counts) - o_chunk, R)
    i_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_rows = i_rows < count
    mask = m_rows[:, None] & (i_columns < H)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_split in range(0, splits):
        offsets = (i_split * R + i_rows).to(tl.int64)[:, None] * H + i_columns[None, :]
        acc += tl.load(p_sums + offsets, mask=mask, other=0.0)
    i_token = tl.load(p_order + o_chunk + i_rows, mask=m_rows, other=0)
    o_column = tl.program_id(1) * COLUMNS
    _put(acc, p_out, i_token, m_rows, o_column, H, p_unit, False, COLUMNS, KEPT_SCALE)


@triton.jit(launch_metadata=costs.weight_gradient)
def _weight_gradient(
    p_gradient,  # [R, V] of stride s_gradient; a descriptor with TMA
    p_hidden,  # [R, H]; a descriptor with TMA
    p_out,  # [V, H]
    p_counts,
    p_unit,
    V,
    H,
    s_gradient,
    o_chunk,
    R,
    programs,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[v] (+)= sum over the chunk's rows r of gradient[r, v] * hidden[r].

    Grid: ``programs`` persistent ones; a tile of ROWS vocabulary entries x COLUMNS at a time,
    column tiles fastest, so that programs side by side read the same gradients. The number of rows
    is read on the device; rows beyond it up to a multiple of DEPTH are 0 in both operands. The
    first chunk writes every element, later ones add, in float32; one alone may write a narrower
    dtype.
    """
    count = tl.maximum(tl.minimum(tl.load(p_counts) - o_chunk, R), 0)
    column_tiles = tl.cdiv(H, COLUMNS)
    tiles = tl.cdiv(V, ROWS) * column_tiles
    if not FIRST:
        tiles = tl.where(count > 0, tiles, 0)
    for i_tile in tl.range(tl.program_id(0), tiles, programs, flatten=FLATTEN):
        o_row = (i_tile // column_tiles) * ROWS
        o_column = (i_tile % column_tiles) * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for r in range(0, count, DEPTH):
            g = load_tile(p_gradient, s_gradient, r, o_row, R, V, DEPTH, ROWS, TMA)
            h = load_tile(p_hidden, H, r, o_column, R, H, DEPTH, COLUMNS, TMA)
            acc = dot(g.T, h, acc, PRECISION)
        i_rows = o_row + tl.arange(0, ROWS)
        m_rows = i_rows < V
        if PARTS == 1:
            _put(acc, p_out, i_rows, m_rows, o_column, H, p_unit, not FIRST, COLUMNS, KEPT_SCALE)
        else:
            left, right = halves(acc, ROWS, COLUMNS)
            half: tl.constexpr = COLUMNS // 2
            _put(left, p_out, i_rows, m_rows, o_column, H, p_unit, not FIRST, half, KEPT_SCALE)
            o_column += half
            _put(right, p_out, i_rows, m_rows, o_column, H, p_unit, not FIRST, half, KEPT_SCALE)


@triton.jit(launch_metadata=costs.bias_gradient)
def _bias_gradient(
    p_gradient,
    p_out,  # float32 [V]
    p_counts,
    p_unit,
    V,
    s_gradient,
    o_chunk,
    R,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[v] (+)= sum over the chunk's rows r of gradient[r, v]. Grid: column tiles. float32."""
    count = tl.minimum(tl.load(p_counts) - o_chunk, R)
    i_columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = i_columns < V
    acc = tl.zeros([COLUMNS], tl.float32)
    for r in range(0, count, ROWS):
        i_rows = r + tl.arange(0, ROWS)
        offsets = i_rows.to(tl.int64)[:, None] * s_gradient + i_columns[None, :]
        m_tile = (i_rows < count)[:, None] & mask[None, :]
        acc += tl.sum(tl.load(p_gradient + offsets, mask=m_tile, other=0.0).to(tl.float32), 0)
    acc = _unscale(acc, p_unit, KEPT_SCALE)
    if not FIRST:
        acc += tl.load(p_out + i_columns, mask=mask, other=0.0)
    tl.store(p_out + i_columns, acc, mask=mask)


def hidden_gradient(
    gradient: Tensor,  # [R, V]
    weight: Tensor,  # [V, H]
    out: Tensor,  # [N, H]
    work: Work,
    chunk: Chunk,
    unit: Tensor | None,
) -> None:
    """Writes the rows of ``out`` that the chunk's tokens have."""
    v, h = weight.shape
    where = architecture(weight.device)
    tiles = tuning.tiles(tuning.HIDDEN_GRADIENT, where, weight.dtype, h)
    programs = multiprocessors(weight.device) * tiles.programs
    needed = cdiv(chunk.rows, tiles.rows) * cdiv(h, tiles.columns)
    # Narrow models have fewer tiles than programs: the vocabulary is then shared out as well.
    steps = cdiv(v, tiles.depth)
    span = cdiv(steps, max(1, programs // needed))
    splits = cdiv(steps, span)
    programs = min(programs, needed * splits)
    sums = out if splits == 1 else out.new_empty(splits * chunk.rows, h, dtype=torch.float32)
    launch(
        _hidden_gradient,
        (programs,),
        operand(gradient, (tiles.rows, tiles.depth), tiles.tma),
        operand(weight, (tiles.depth, tiles.columns), tiles.tma),
        sums,
        *work,
        unit,
        v,
        h,
        gradient.stride(0),
        weight.stride(0),
        *chunk,
        span * tiles.depth,
        splits,
        programs,
        SPLIT=splits > 1,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        PARTS=tiles.parts,
        TMA=tiles.tma,
        FLATTEN=tiles.flatten,
        PRECISION=precision(weight.dtype),
        KEPT_SCALE=KEPT_SCALE[weight.dtype],
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if splits > 1:
        columns = min(1024, triton.next_power_of_2(h))
        rows = min(tuning.ROW_BLOCK, tuning.elements(where) // columns)
        launch(
            _add_splits,
            (cdiv(chunk.rows, rows), cdiv(h, columns)),
            sums,
            out,
            *work,
            unit,
            h,
            *chunk,
            splits,
            ROWS=rows,
            COLUMNS=columns,
            KEPT_SCALE=KEPT_SCALE[weight.dtype],
            num_warps=8,
        )


def weight_gradient(
    gradient: Tensor,  # [R, V]
    hidden: Tensor,  # [R, H] the chunk's rows that have a gradient
    out: Tensor,  # [V, H]
    work: Work,
    chunk: Chunk,
    unit: Tensor | None,
) -> None:
    """Writes ``out`` in the first chunk, adds to it in the others."""
    v, h = out.shape
    tiles = tuning.tiles(tuning.WEIGHT_GRADIENT, architecture(out.device), hidden.dtype, h)
    programs = multiprocessors(out.device) * tiles.programs
    programs = min(programs, cdiv(v, tiles.rows) * cdiv(h, tiles.columns))
    launch(
        _weight_gradient,
        (programs,),
        operand(gradient, (tiles.depth, tiles.rows), tiles.tma),
        operand(hidden, (tiles.depth, tiles.columns), tiles.tma),
        out,
        work.counts,
        unit,
        v,
        h,
        gradient.stride(0),
        *chunk,
        programs,
        FIRST=chunk.start == 0,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        PARTS=tiles.parts,
        TMA=tiles.tma,
        FLATTEN=tiles.flatten,
        PRECISION=precision(hidden.dtype),
        KEPT_SCALE=KEPT_SCALE[hidden.dtype],
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def bias_gradient(
    gradient: Tensor,  # [R, V]
    out: Tensor,  # float32 [V]
    work: Work,
    chunk: Chunk,
    unit: Tensor | None,
) -> None:
    """Writes ``out`` in the first chunk, adds to it in the others."""
    v = out.shape[0]
    launch(
        _bias_gradient,
        (cdiv(v, 128),),
        gradient,
        out,
        work.counts,
        unit,
        v,
        gradient.stride(0),
        *chunk,
        FIRST=chunk.start == 0,
        ROWS=32,
        COLUMNS=128,
        KEPT_SCALE=KEPT_SCALE[gradient.dtype],
    )
