"""The one kernel that multiplies hidden by the head's weight, and what it makes of the logits."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import (
    architecture,
    cast,
    cdiv,
    dot,
    exp,
    expm1,
    halves,
    launch,
    multiprocessors,
    precision,
)
from vcore_kernels.triton.head_rows import (
    KEPT_SCALE,
    Chunk,
    Head,
    Known,
    TileStatistics,
    Work,
    row_factor,
)


@triton.jit
def load_tile(
    p_matrix,  # a descriptor with TMA, else a pointer to [rows, width] of stride s_matrix
    s_matrix,
    o_row,
    o_column,
    n_rows,
    n_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """The tile at (o_row, o_column), 0 outside the matrix."""
    if TMA:
        tile = p_matrix.load([o_row, o_column])
    else:
        i_rows = o_row + tl.arange(0, ROWS)
        i_columns = o_column + tl.arange(0, COLUMNS)
        mask = (i_rows < n_rows)[:, None] & (i_columns < n_columns)[None, :]
        offsets = i_rows.to(tl.int64)[:, None] * s_matrix + i_columns[None, :]
        tile = tl.load(p_matrix + offsets, mask=mask, other=0.0)
    return tile


@triton.jit
def _tanh(x):
    """tanh with full relative accuracy near 0."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _take(
    z,  # [ROWS, PART] of hidden weight'
    dz,  # [ROWS, PART] of the second products, or z where there are none
    o_row,
    i_part,  # which part of PART columns
    count,
    p_bias,
    p_second_bias,
    p_order,
    p_target,
    p_max,
    p_sum,
    p_moment,
    p_second_max,
    p_second_sum,
    p_at_target,
    p_second_at_target,
    p_kept,
    p_nll,
    p_top,
    p_rest,
    p_factor,
    p_unit,
    V,
    s_kept,
    o_chunk,
    R,
    scale,
    softcap,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """What ``_logit_tiles`` makes of some columns of a tile of products."""
    i_rows = o_row + tl.arange(0, ROWS)
    i_columns = i_part * PART + tl.arange(0, PART)
    m_rows = i_rows < count
    m_columns = i_columns < V
    if p_bias is not None:
        bias = tl.load(p_bias + i_columns, mask=m_columns, other=0.0).to(tl.float32)
        z += bias[None, :]
    z *= scale
    if MODE == "jvp" or MODE == "pair":
        if p_second_bias is not None:
            bias = tl.load(p_second_bias + i_columns, mask=m_columns, other=0.0)
            dz += bias.to(tl.float32)[None, :]
        dz *= scale
    if SOFTCAP:
        t = _tanh(z / softcap)
        z = softcap * t
        if MODE == "jvp":
            dz *= 1.0 - t * t
        elif MODE == "pair":  # tanh(a + b) - tanh(a) without subtracting them
            d = _tanh(dz / softcap)
            moved = (t + d) / (1.0 + t * d)
            dz = softcap * d * (1.0 - t * moved)

    i_token = tl.load(p_order + o_chunk + i_rows, mask=m_rows, other=0)
    target = tl.load(p_target + i_token, mask=m_rows, other=-1).to(tl.int32)
    is_target = i_columns[None, :] == target[:, None]
    if MODE == "gradients":
        top = tl.load(p_top + i_token, mask=m_rows, other=0.0)
        rest = tl.load(p_rest + i_token, mask=m_rows, other=0.0)
        nll = tl.load(p_nll + i_token, mask=m_rows, other=0.0)
        factor = row_factor(p_factor, p_unit, i_token, m_rows, ROWS)
        factor *= scale * KEPT_SCALE
        g = exp(z - top[:, None] - rest[:, None])
        # 1 - p keeps its relative accuracy where p is close to 1
        g = tl.where(is_target, expm1(-nll)[:, None], g)
        if SOFTCAP:
            g *= 1.0 - t * t
        g = tl.where(m_rows[:, None], g * factor[:, None], 0.0)
        offsets = i_rows.to(tl.int64)[:, None] * s_kept + i_columns[None, :]
        mask = (i_rows < R)[:, None] & m_columns[None, :]
        tl.store(p_kept + offsets, cast(g, p_kept.dtype.element_ty), mask=mask)
    else:
        has_target = m_rows & (target >= i_part * PART) & (target < i_part * PART + PART)
        at_target = tl.sum(tl.where(is_target, z, 0.0), 1)
        tl.store(p_at_target + i_rows, at_target, mask=has_target)
        z = tl.where(is_target | (m_columns[None, :] == 0), float("-inf"), z)
        o_statistics = tl.cast(i_part, tl.int64) * R + i_rows
        m = tl.max(z, 1)
        e = exp(z - tl.where(m == float("-inf"), 0.0, m)[:, None])
        tl.store(p_max + o_statistics, m, mask=m_rows)
        tl.store(p_sum + o_statistics, tl.sum(e, 1), mask=m_rows)
        if MODE == "jvp" or MODE == "pair":
            second_at_target = tl.sum(tl.where(is_target, dz, 0.0), 1)
            tl.store(p_second_at_target + i_rows, second_at_target, mask=has_target)
            # a masked class counts 0 whatever its tangent
            term = dz if MODE == "jvp" else expm1(dz)
            moment = tl.sum(tl.where(e == 0, 0.0, e * term), 1)
            tl.store(p_moment + o_statistics, moment, mask=m_rows)
        if MODE == "pair":
            z = tl.where(z == float("-inf"), z, z + dz)
            m = tl.max(z, 1)
            e = exp(z - tl.where(m == float("-inf"), 0.0, m)[:, None])
            tl.store(p_second_max + o_statistics, m, mask=m_rows)
            tl.store(p_second_sum + o_statistics, tl.sum(e, 1), mask=m_rows)
        if MODE == "keep":
            if SOFTCAP:
                e *= 1.0 - t * t
            offsets = i_rows.to(tl.int64)[:, None] * s_kept + i_columns[None, :]
            mask = m_rows[:, None] & m_columns[None, :]
            tl.store(p_kept + offsets, cast(e * KEPT_SCALE, p_kept.dtype.element_ty), mask=mask)


@triton.jit(launch_metadata=costs.logit_tiles)
def _logit_tiles(
    # operands: descriptors with TMA, else pointers
    p_hidden,  # [R, H] rows of the chunk
    p_second_hidden,  # [R, H] their tangents, or differences to the perturbed ones
    p_right_hidden,  # [R, H] pair with a second weight: the perturbed ones themselves
    p_weight,  # [V, H]
    p_second_weight,  # [V, H] its tangent, or the perturbed one
    p_bias,  # [V]
    p_second_bias,  # [V] its tangent, or the difference to the perturbed one
    p_order,  # int32 [N] the token of each row in order of work
    p_target,  # int64 [N]
    p_counts,  # int32 [2] rows that have a gradient, rows that have a loss
    # statistics of each tile of columns, [tiles, R]
    p_max,
    p_sum,
    p_moment,
    p_second_max,
    p_second_sum,
    # [R]
    p_at_target,
    p_second_at_target,
    # exponentials or gradients
    p_kept,  # [R, V] of stride s_kept
    # gradients: statistics of the tokens, [N]
    p_nll,
    p_top,
    p_rest,
    p_factor,  # or None for 1
    p_unit,  # [1] or None for 1
    V,
    H,
    s_weight,
    s_second_weight,
    s_kept,
    o_chunk,  # position of the chunk's first row
    R,
    scale,
    softcap,
    programs,
    MODE: tl.constexpr,  # "losses", "keep", "gradients", "jvp", "pair"
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """Tiles of z = cap*tanh(scale*(hidden weight' + bias)/cap), and what is wanted of them.

    losses:     per row and part of a tile, over the classes other than the target: m = max z and
                sum exp(z - m); and z of the target itself.
    keep:       also exp(z - m) * dz/d(product), in the operands' dtype, [R, V].
    gradients:  instead of all that, factor * d nll / d product from the known log-sum-exp, [R, V],
                rows beyond the last up to the tile's end 0.
    jvp:        the first and sum exp(z - m) dz, where dz is the tangent of z; dz of the target.
    pair:       the first, sum exp(z - m) expm1(dz), where dz is the difference of the perturbed z
                to z, and the first for z + dz; dz of the target.

    Grid: ``programs`` persistent ones; a tile of ROWS x COLUMNS at a time, row tiles fastest, so
    that programs side by side read the same tile of the weight. The number of rows is read on the
    device. Products accumulate in float32 along H, never rounded before the exponential. Columns
    beyond V count as minus infinity. A tile is taken in PARTS of its columns.
    """
    which: tl.constexpr = 0 if MODE == "gradients" else 1
    count = tl.minimum(tl.load(p_counts + which) - o_chunk, R)
    row_tiles = tl.cdiv(tl.maximum(count, 0), ROWS)
    column_tiles = tl.cdiv(V, COLUMNS)
    PART: tl.constexpr = COLUMNS // PARTS
    shared = (
        count,
        p_bias,
        p_second_bias,
        p_order,
        p_target,
        p_max,
        p_sum,
        p_moment,
        p_second_max,
        p_second_sum,
        p_at_target,
        p_second_at_target,
        p_kept,
        p_nll,
        p_top,
        p_rest,
        p_factor,
        p_unit,
        V,
        s_kept,
        o_chunk,
        R,
        scale,
        softcap,
    )
    for i_tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=FLATTEN):
        i_row_tile = i_tile % row_tiles
        i_column_tile = i_tile // row_tiles
        o_row = i_row_tile * ROWS
        o_column = i_column_tile * COLUMNS
        z = tl.zeros([ROWS, COLUMNS], tl.float32)
        if MODE == "jvp" or MODE == "pair":
            dz = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, H, DEPTH):
            h = load_tile(p_hidden, H, o_row, k, R, H, ROWS, DEPTH, TMA)
            w = load_tile(p_weight, s_weight, o_column, k, V, H, COLUMNS, DEPTH, TMA)
            z = dot(h, w.T, z, PRECISION)
            if MODE == "jvp" or MODE == "pair":
                dh = load_tile(p_second_hidden, H, o_row, k, R, H, ROWS, DEPTH, TMA)
                dz = dot(dh, w.T, dz, PRECISION)
                if p_second_weight is not None:
                    dw = load_tile(
                        p_second_weight, s_second_weight, o_column, k, V, H, COLUMNS, DEPTH, TMA
                    )
                    if MODE == "pair":
                        dw = cast(dw.to(tl.float32) - w.to(tl.float32), w.dtype)
                        h = load_tile(p_right_hidden, H, o_row, k, R, H, ROWS, DEPTH, TMA)
                    dz = dot(h, dw.T, dz, PRECISION)

        if MODE != "jvp" and MODE != "pair":
            dz = z
        # A part at a time, so that its exponentials and masks fit into registers beside the rest.
        i_part = i_column_tile * PARTS
        if PARTS == 1:
            _take(z, dz, o_row, i_part, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)
        else:
            z0, z1 = halves(z, ROWS, COLUMNS)
            dz0, dz1 = halves(dz, ROWS, COLUMNS)
            if PARTS == 2:
                _take(z0, dz0, o_row, i_part, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)
                _take(z1, dz1, o_row, i_part + 1, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)
            else:
                half: tl.constexpr = COLUMNS // 2
                z00, z01 = halves(z0, ROWS, half)
                dz00, dz01 = halves(dz0, ROWS, half)
                _take(z00, dz00, o_row, i_part, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)
                _take(z01, dz01, o_row, i_part + 1, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)
                z10, z11 = halves(z1, ROWS, half)
                dz10, dz11 = halves(dz1, ROWS, half)
                _take(z10, dz10, o_row, i_part + 2, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)
                _take(z11, dz11, o_row, i_part + 3, *shared, MODE, ROWS, PART, SOFTCAP, KEPT_SCALE)


def operand(matrix: Tensor, block: tuple[int, int], tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel loads tiles of ``matrix`` from."""
    if tma:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block))
    return matrix


class Second(NamedTuple):
    """The chunk's rows, weight and bias at the other point; see the kernel for what they are."""

    hidden: Tensor  # [R, H]
    right_hidden: Tensor | None  # [R, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


def settings(weight: Tensor, products: str = "one") -> tuning.Tiles:
    """How the logits of a head are tiled."""
    where = architecture(weight.device)
    return tuning.tiles(tuning.LOGITS, where, weight.dtype, weight.shape[1], products)


def products_of(mode: str, second_weight: Tensor | None) -> str:
    """The tables' key for the products of a jvp or a pair."""
    return mode if second_weight is None else f"{mode}+weight"


def statistics_of(
    mode: str,
    hidden: Tensor,  # [R, H] the chunk's rows
    head: Head,
    work: Work,
    chunk: Chunk,
    second: Second | None = None,
    kept: Tensor | None = None,  # [R, V]
) -> TileStatistics:
    """One sweep over the weight: MODE losses, keep, jvp or pair of the kernel."""
    products = "one" if second is None else products_of(mode, second.weight)
    tiles = settings(head.weight, products)
    number = cdiv(head.vocabulary, tiles.columns) * tiles.parts  # the last ones may be empty

    def of_tiles() -> Tensor:
        return hidden.new_empty(number, chunk.rows, dtype=torch.float32)

    def of_rows() -> Tensor:
        return hidden.new_empty(chunk.rows, dtype=torch.float32)

    out = TileStatistics(
        max=of_tiles(),
        sum=of_tiles(),
        moment=of_tiles() if second else None,
        second_max=of_tiles() if mode == "pair" else None,
        second_sum=of_tiles() if mode == "pair" else None,
        at_target=of_rows(),
        second_at_target=of_rows() if second else None,
    )
    _sweep(mode, hidden, head, work, chunk, tiles, second=second, statistics=out, kept=kept)
    return out


def logit_gradients(
    hidden: Tensor,  # [R, H]
    head: Head,
    work: Work,
    chunk: Chunk,
    known: Known,
    out: Tensor,  # [R, V]
) -> None:
    """Forms the logits again and writes factor * d nll / d product, in units of unit/KEPT_SCALE."""
    tiles = settings(head.weight)
    _sweep("gradients", hidden, head, work, chunk, tiles, kept=out, known=known)


def _sweep(
    mode: str,
    hidden: Tensor,
    head: Head,
    work: Work,
    chunk: Chunk,
    tiles: tuning.Tiles,
    *,
    second: Second | None = None,
    statistics: TileStatistics | None = None,
    kept: Tensor | None = None,
    known: Known | None = None,
) -> None:
    width = hidden.shape[1]
    right = [head.weight, second.weight if second else None]
    left = [hidden, second.hidden if second else None, second.right_hidden if second else None]

    def described(
        matrices: list[Tensor | None], rows: int
    ) -> list[Tensor | TensorDescriptor | None]:
        block = (rows, tiles.depth)
        return [None if m is None else operand(m, block, tiles.tma) for m in matrices]

    programs = multiprocessors(hidden.device) * tiles.programs
    needed = cdiv(chunk.rows, tiles.rows) * cdiv(head.vocabulary, tiles.columns)
    launch(
        _logit_tiles,
        (min(programs, needed),),
        *described(left, tiles.rows),
        *described(right, tiles.columns),
        head.bias,
        second.bias if second else None,
        work.order,
        head.target,
        work.counts,
        *(statistics or [None] * len(TileStatistics._fields)),
        kept,
        *([known.nll, *known.lse.unbind(), known.factor, known.unit] if known else [None] * 5),
        head.vocabulary,
        width,
        head.weight.stride(0),
        0 if right[1] is None else right[1].stride(0),
        0 if kept is None else kept.stride(0),
        *chunk,
        head.scale,
        head.softcap,
        min(programs, needed),
        MODE=mode,
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        DEPTH=tiles.depth,
        PARTS=tiles.parts,
        TMA=tiles.tma,
        FLATTEN=tiles.flatten,
        PRECISION=precision(hidden.dtype),
        SOFTCAP=head.softcap != 0,
        KEPT_SCALE=KEPT_SCALE[hidden.dtype],
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
