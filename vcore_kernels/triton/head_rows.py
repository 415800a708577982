"""The rows of a head operator: which tokens cost work, gathered in chunks, and per-row kernels.

Tokens are taken in an order of work: those that have a gradient, then the others that have a loss.
How many there are is known on the device alone: a prefix sum makes the order, every kernel is
launched for the worst case, and its programs end where the rows do.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import architecture, cast, cdiv, exp, expm1, launch, log1p

# dtype of the operands -> what kept exponentials and gradients are multiplied by, so that float16,
# whose smallest normal number is 6e-5, keeps small probabilities.
KEPT_SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 32768.0}


class Head(NamedTuple):
    """The linear head of a call: logits = cap*tanh(scale*(hidden weight' + bias)/cap)."""

    weight: Tensor  # [V, H], rows contiguous
    target: Tensor  # int64 [N], contiguous
    bias: Tensor | None  # [V], contiguous
    softcap: float  # 0: none
    scale: float
    ignore_index: int

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]


class Known(NamedTuple):
    """What is known of each token [N] when the logits' gradients are formed."""

    nll: Tensor
    lse: Tensor  # [2, N]
    factor: Tensor | None
    unit: Tensor | None  # [1]


class Work(NamedTuple):
    """Tokens in order of work."""

    order: Tensor  # int32 [N + 1] the token of each place; beyond counts[1] undefined
    counts: Tensor  # int32 [2] tokens that have a gradient; tokens that have a loss


def order_of_work(target: Tensor, ignore_index: int, factor: Tensor | None = None) -> Work:
    """Tokens with a target; those with a nonzero ``factor`` [N], if given, first."""
    n = target.shape[0]
    if n == 0:
        return Work(*(target.new_zeros(size, dtype=torch.int32) for size in (1, 2)))
    valid = target != ignore_index
    first = valid if factor is None else valid & (factor != 0)
    ahead, all_valid = first.cumsum(0), valid.cumsum(0)
    # A token's place among the first, or behind all of them among the others.
    place = torch.where(first, ahead, ahead[-1] + all_valid - ahead) - 1
    index = torch.empty(n + 1, dtype=torch.int32, device=target.device)
    tokens = torch.arange(n, dtype=torch.int32, device=target.device)
    index.scatter_(0, place.where(valid, n), tokens)  # ignored ones all go to place n
    return Work(index, torch.stack([ahead[-1], all_valid[-1]]).to(torch.int32))


class Chunk(NamedTuple):
    """Consecutive places of the order of work; ``rows`` of them at most, a multiple of 128."""

    start: int
    rows: int


def chunks(n: int, row_bytes: int, limit: int) -> list[Chunk]:
    """N places in equal chunks whose rows take ``row_bytes`` each and ``limit`` bytes together."""
    block = tuning.ROW_BLOCK
    most = max(block, limit // max(row_bytes, 1) // block * block)
    if n == 0:
        return []
    size = cdiv(cdiv(n, cdiv(n, most)), block) * block
    return [Chunk(start, size) for start in range(0, n, size)]


# ---- gathering ----


@triton.jit(launch_metadata=costs.gather_rows)
def _gather_rows(
    p_from,  # [N, H] of strides s_row, s_column
    p_minus,  # [N, H] of strides s_minus_row, s_minus_column, or None
    p_to,  # [R, H]
    p_index,
    p_counts,
    H,
    s_row,
    s_column,
    s_minus_row,
    s_minus_column,
    o_chunk,
    R,
    WHICH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """to[r] = from[index[r]] (- minus[index[r]], in float32, rounded once), any strides.

    Grid: (row tiles, column tiles). Rows beyond the last one up to a multiple of ROW_BLOCK are 0,
    because products that sum over rows read them; further ones are left alone.
    """
    count = tl.minimum(tl.load(p_counts + WHICH) - o_chunk, R)
    o_row = tl.program_id(0) * ROWS
    if o_row < tl.cdiv(tl.maximum(count, 0), ROW_BLOCK) * ROW_BLOCK:
        i_rows = o_row + tl.arange(0, ROWS)
        i_columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        m_rows, m_columns = i_rows < count, i_columns < H
        mask = m_rows[:, None] & m_columns[None, :]
        i_token = tl.load(p_index + o_chunk + i_rows, mask=m_rows, other=0).to(tl.int64)
        o_columns = i_columns.to(tl.int64)
        x = tl.load(
            p_from + i_token[:, None] * s_row + o_columns[None, :] * s_column, mask=mask, other=0.0
        )
        if p_minus is not None:
            offsets = i_token[:, None] * s_minus_row + o_columns[None, :] * s_minus_column
            minus = tl.load(p_minus + offsets, mask=mask, other=0.0)
            x = cast(x.to(tl.float32) - minus.to(tl.float32), p_to.dtype.element_ty)
        offsets = i_rows.to(tl.int64)[:, None] * H + i_columns[None, :]
        tl.store(p_to + offsets, x, mask=m_columns[None, :])


def gather(
    x: Tensor, work: Work, chunk: Chunk, *, minus: Tensor | None = None, live: bool = False
) -> Tensor:
    """The chunk's rows of ``x`` [N, H] (less those of ``minus``), contiguous.

    With ``live`` only those that have a gradient, whatever the others hold.
    """
    out = x.new_empty(chunk.rows, x.shape[1])
    columns = min(1024, triton.next_power_of_2(x.shape[1]))
    # two operands at a time take twice the registers
    elements = tuning.elements(architecture(x.device)) // (1 if minus is None else 2)
    rows = min(tuning.ROW_BLOCK, elements // columns)
    grid = (cdiv(chunk.rows, rows), cdiv(x.shape[1], columns))
    strides = (*x.stride(), *(x.stride() if minus is None else minus.stride()))
    launch(
        _gather_rows,
        grid,
        x,
        minus,
        out,
        work.order,
        work.counts,
        x.shape[1],
        *strides,
        *chunk,
        WHICH=0 if live else 1,
        ROWS=rows,
        COLUMNS=columns,
        ROW_BLOCK=tuning.ROW_BLOCK,
        num_warps=8,
    )
    return out


# ---- statistics ----


class TileStatistics(NamedTuple):
    """What each tile of columns adds to its rows' statistics, float32; see head_logits."""

    max: Tensor  # [tiles, R]
    sum: Tensor  # [tiles, R]
    moment: Tensor | None  # [tiles, R]
    second_max: Tensor | None  # [tiles, R]
    second_sum: Tensor | None  # [tiles, R]
    at_target: Tensor  # [R]
    second_at_target: Tensor | None  # [R]


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) with full relative accuracy far below 0."""
    return tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))


@triton.jit
def _top(p_max, i_rows, m_rows, tiles, R, TILES: tl.constexpr, ROWS: tl.constexpr):
    """The largest of each row's tile maxima."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for i_tile in range(0, tiles, TILES):
        i_tiles = i_tile + tl.arange(0, TILES)
        mask = (i_tiles < tiles)[:, None] & m_rows[None, :]
        offsets = i_tiles.to(tl.int64)[:, None] * R + i_rows[None, :]
        top = tl.maximum(top, tl.max(tl.load(p_max + offsets, mask=mask, other=float("-inf")), 0))
    return top


@triton.jit
def _sum(p_max, p_sum, p_moment, top, i_rows, m_rows, tiles, R, TILES, ROWS):
    """The sum of exp(z - top) over all tiles, and of the moments if there are any."""
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([ROWS], tl.float32)
    moment = tl.zeros([ROWS], tl.float32)
    for i_tile in range(0, tiles, TILES):
        i_tiles = i_tile + tl.arange(0, TILES)
        mask = (i_tiles < tiles)[:, None] & m_rows[None, :]
        offsets = i_tiles.to(tl.int64)[:, None] * R + i_rows[None, :]
        m = tl.load(p_max + offsets, mask=mask, other=float("-inf"))
        share = exp(m - base[None, :])
        total += tl.sum(share * tl.load(p_sum + offsets, mask=mask, other=0.0), 0)
        if p_moment is not None:
            term = share * tl.load(p_moment + offsets, mask=mask, other=0.0)
            moment += tl.sum(tl.where(share == 0, 0.0, term), 0)
    return total, moment


@triton.jit(launch_metadata=costs.row_statistics)
def _row_statistics(
    p_max,
    p_sum,
    p_moment,
    p_second_max,
    p_second_sum,
    p_at_target,
    p_second_at_target,
    p_index,
    p_counts,
    p_nll,
    p_top,
    p_rest,
    p_second,
    tiles,
    o_chunk,
    R,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Combines the tiles of each row, in their order, and writes to the row's token.

    gap = logsumexp over the other classes - z_target; nll = log(1 + exp(gap)); top is the largest
    logit, rest = logsumexp over all classes - top. MODE jvp: second = (1 - p_target) * (mean of dz
    over the others - dz_target). pair: second = nll - perturbed nll, from the change of the gap,
    or by subtraction where that change is large.

    Grid: row tiles. float32.
    """
    count = tl.minimum(tl.load(p_counts + 1) - o_chunk, R)
    o_row = tl.program_id(0) * ROWS
    if o_row < count:
        i_rows = o_row + tl.arange(0, ROWS)
        m_rows = i_rows < count
        top = _top(p_max, i_rows, m_rows, tiles, R, TILES, ROWS)
        total, moment = _sum(p_max, p_sum, p_moment, top, i_rows, m_rows, tiles, R, TILES, ROWS)
        z = tl.load(p_at_target + i_rows, mask=m_rows, other=0.0)
        # one class alone, or all others masked: total is 0
        log_total = tl.where(total == 0, 0.0, tl.log(total))
        gap = tl.where(total == 0, float("-inf"), (top - z) + log_total)
        nll = _softplus(gap)
        leads = z >= top
        i_token = tl.load(p_index + o_chunk + i_rows, mask=m_rows, other=0).to(tl.int64)
        tl.store(p_nll + i_token, nll, mask=m_rows)
        tl.store(p_top + i_token, tl.where(leads, z, top), mask=m_rows)
        rest = tl.where(leads, nll, log_total + _softplus(-gap))
        tl.store(p_rest + i_token, rest, mask=m_rows)
        if MODE != "losses":
            other_than_target = -expm1(-nll)  # 1 - p_target
            dz = tl.load(p_second_at_target + i_rows, mask=m_rows, other=0.0)
            mean = tl.where(total == 0, 0.0, moment / total)
            if MODE == "jvp":
                second = other_than_target * (mean - dz)
                second = tl.where(other_than_target == 0, 0.0, second)
            else:
                change = log1p(mean) - dz
                near = -log1p(other_than_target * expm1(change))
                top = _top(p_second_max, i_rows, m_rows, tiles, R, TILES, ROWS)
                total, _ = _sum(
                    p_second_max, p_second_sum, None, top, i_rows, m_rows, tiles, R, TILES, ROWS
                )
                far_gap = (top - (z + dz)) + tl.log(total)
                far = nll - _softplus(tl.where(total == 0, float("-inf"), far_gap))
                is_near = (mean > -0.5) & (tl.abs(change) < 1)
                second = tl.where(is_near, near, far)
            tl.store(p_second + i_token, second, mask=m_rows)


def row_statistics(
    tiles: TileStatistics,
    work: Work,
    chunk: Chunk,
    nll: Tensor,
    lse: Tensor,
    mode: str = "losses",
    second: Tensor | None = None,
) -> None:
    """Writes ``nll`` [N], ``lse`` [2, N] and ``second`` [N] at the chunk's tokens."""
    rows = 16
    number = tiles.max.shape[0]
    launch(
        _row_statistics,
        (cdiv(chunk.rows, rows),),
        *tiles,
        *work,
        nll,
        *lse.unbind(),
        second,
        number,
        *chunk,
        MODE=mode,
        ROWS=rows,
        TILES=min(64, triton.next_power_of_2(number)),
    )


# ---- gradients of logits from kept exponentials ----


@triton.jit
def row_factor(p_factor, p_unit, i_token, mask, SIZE: tl.constexpr):
    """What the gradient of each token [SIZE] is multiplied by, in units of p_unit."""
    factor = tl.full([SIZE], 1.0, tl.float32)
    if p_factor is not None:
        factor = tl.load(p_factor + i_token, mask=mask, other=0.0).to(tl.float32)
    if p_unit is not None:
        factor /= tl.load(p_unit)
    return factor


@triton.jit(launch_metadata=costs.logit_gradients)
def _logit_gradients(
    p_kept,
    p_max,
    p_index,
    p_counts,
    p_target,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """In place: kept[r, v] <- factor_r * d nll_r / d product_v, in units of p_unit / KEPT_SCALE.

    From KEPT_SCALE * exp(z - m) * dz/d product, m the maximum of its tile of COLUMNS; at the target
    from nll, where 1 - p keeps its relative accuracy. Rows beyond the last up to a multiple of
    ROW_BLOCK become 0. Grid: (row tiles, column tiles). float32, rounded once.
    """
    count = tl.minimum(tl.load(p_counts) - o_chunk, R)
    o_row = tl.program_id(0) * ROWS
    if o_row < tl.cdiv(tl.maximum(count, 0), ROW_BLOCK) * ROW_BLOCK:
        i_rows = o_row + tl.arange(0, ROWS)
        i_columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        m_rows, m_columns = i_rows < count, i_columns < V
        i_token = tl.load(p_index + o_chunk + i_rows, mask=m_rows, other=0)
        target = tl.load(p_target + i_token, mask=m_rows, other=-1).to(tl.int32)
        nll = tl.load(p_nll + i_token, mask=m_rows, other=0.0)
        top = tl.load(p_top + i_token, mask=m_rows, other=0.0)
        rest = tl.load(p_rest + i_token, mask=m_rows, other=0.0)
        factor = row_factor(p_factor, p_unit, i_token, m_rows, ROWS) * scale
        o_max = tl.program_id(1).to(tl.int64) * R + i_rows
        m = tl.load(p_max + o_max, mask=m_rows, other=0.0)
        # no class but the target in this tile: nothing was kept
        by = tl.where(m == float("-inf"), 0.0, factor * exp(m - top - rest))
        at_target = factor * expm1(-nll) * KEPT_SCALE
        if SOFTCAP:
            y = (top + (rest - nll)) / softcap
            at_target *= 1.0 - y * y
        offsets = i_rows.to(tl.int64)[:, None] * s_kept + i_columns[None, :]
        mask = m_rows[:, None] & m_columns[None, :]
        g = tl.load(p_kept + offsets, mask=mask, other=0.0).to(tl.float32) * by[:, None]
        g = tl.where(i_columns[None, :] == target[:, None], at_target[:, None], g)
        g = tl.where(m_rows[:, None], g, 0.0)
        tl.store(p_kept + offsets, cast(g, p_kept.dtype.element_ty), mask=m_columns[None, :])


def logit_gradients_from_kept(
    kept: Tensor,  # [R, V]
    tiles: TileStatistics,
    work: Work,
    chunk: Chunk,
    head: Head,
    known: Known,
    columns: int,  # of a tile of the statistics
) -> None:
    """``kept`` becomes the gradient of the logits' products."""
    rows = min(tuning.ROW_BLOCK, tuning.elements(architecture(kept.device)) // columns)
    launch(
        _logit_gradients,
        (cdiv(chunk.rows, rows), cdiv(head.vocabulary, columns)),
        kept,
        tiles.max,
        *work,
        head.target,
        known.nll,
        *known.lse.unbind(),
        known.factor,
        known.unit,
        head.vocabulary,
        kept.stride(0),
        *chunk,
        head.scale,
        head.softcap,
        ROWS=rows,
        COLUMNS=columns,
        ROW_BLOCK=tuning.ROW_BLOCK,
        SOFTCAP=head.softcap != 0,
        KEPT_SCALE=KEPT_SCALE[kept.dtype],
        num_warps=4,
    )
