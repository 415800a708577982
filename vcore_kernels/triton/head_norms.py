"""Norm of the weight's gradient for each sequence, never holding more of a gradient than a tile.

With the losses known (one product), the logits' gradients g are formed for a slice of the
vocabulary at a time (together a second product). What becomes of a slice is one of two:

product:  tiles of the V x H gradient itself, sum over the sequence's tokens of g h', of which only
          the sum of squares leaves the kernel (a third product);
gram:     ||sum_t g_t h_t'||^2 = sum over t, t' of (g_t.g_t') (h_t.h_t'). The products of the g
          accumulate over the slices in [B, T, T]. For sequences shorter than H that is less work,
          so padded batches, whose T the host knows, take it by the count of multiplications.

The rows of a sequence stay together: the order of work is that of the tokens, without the ignored
ones. For ``product`` each sequence's rows are filled up with zeros to a multiple of the kernel's
depth, so that no step of it reaches into the next sequence. Sums of squares go to places of their
own and are added in a fixed order, whatever the batch and the slices: a sequence has the same norm
in every batch, bit for bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import architecture, cdiv, dot, launch, precision
from vcore_kernels.triton.head import _forward, _head, _rows
from vcore_kernels.triton.head_logits import (
    load_tile,
    logit_gradients,
    operand,
    settings,
)
from vcore_kernels.triton.head_rows import KEPT_SCALE, Chunk, Head, Known, Work

# ---- kernels ----


@triton.jit(launch_metadata=costs.squares_of_products)
def _squares_of_products(
    p_gradient,  # [R, V] of stride s_gradient; a descriptor with TMA
    p_hidden,  # [R, H]; a descriptor with TMA
    p_starts,  # int32 [S + 1] first row of each segment, a multiple of DEPTH after the first
    p_out,  # [S, tiles of all slices]
    V,
    H,
    s_gradient,
    R,
    o_out,  # the slice's first tile
    s_out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[s, tile] = sum over the tile of (sum over the segment's rows r of g[r, v] h[r, k])^2.

    Grid: segments x tiles of ROWS vocabulary entries x COLUMNS, columns fastest, so that programs
    side by side read the same gradients, and segments slowest, so that their rows stay in cache.
    The segments' bounds are read on the device. float32 sums of products, along the rows.
    """
    column_tiles = tl.cdiv(H, COLUMNS)
    tiles = tl.cdiv(V, ROWS) * column_tiles
    i_segment = tl.program_id(0) // tiles
    i_tile = tl.program_id(0) % tiles
    o_row = (i_tile // column_tiles) * ROWS
    o_column = (i_tile % column_tiles) * COLUMNS
    begin = tl.load(p_starts + i_segment)
    end = tl.load(p_starts + i_segment + 1)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for r in range(begin, end, DEPTH):
        g = load_tile(p_gradient, s_gradient, r, o_row, R, V, DEPTH, ROWS, TMA)
        h = load_tile(p_hidden, H, r, o_column, R, H, DEPTH, COLUMNS, TMA)
        acc = dot(g.T, h, acc, PRECISION)
    acc *= 1.0 / KEPT_SCALE
    total = tl.sum(acc * acc)
    tl.store(p_out + i_segment.to(tl.int64) * s_out + o_out + i_tile, total)


@triton.jit(launch_metadata=costs.gram_of_gradients)
def _gram_of_gradients(
    p_gradient,  # [R, V] of stride s_gradient; a descriptor with TMA
    p_starts,  # int32 [B + 1]
    p_gram,  # [B, L, L], L a multiple of ROWS
    V,
    s_gradient,
    R,
    L,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gram[b, i, j] (+)= sum over v of g[i, v] g[j, v], rows counted from the sequence's first.

    Grid: sequences x square tiles, of which those above the diagonal and beyond the sequence's rows
    end at once. Rows of the next sequence get into the last tile, but not out of it: they meet no
    row of this one before _squares_of_grams leaves them out. Accumulated in float32 along V, from
    what the slices before have left.
    """
    row_tiles = L // ROWS
    i_segment = tl.program_id(0) // (row_tiles * row_tiles)
    i_tile = tl.program_id(0) % (row_tiles * row_tiles)
    i, j = i_tile // row_tiles, i_tile % row_tiles
    begin = tl.load(p_starts + i_segment)
    count = tl.load(p_starts + i_segment + 1) - begin
    if (j <= i) & (i * ROWS < count):
        i_rows = i * ROWS + tl.arange(0, ROWS)
        i_columns = j * ROWS + tl.arange(0, ROWS)
        offsets = (i_segment.to(tl.int64) * L + i_rows[:, None]) * L + i_columns[None, :]
        acc = tl.zeros([ROWS, ROWS], tl.float32) if FIRST else tl.load(p_gram + offsets)
        for v in range(0, V, DEPTH):
            left = load_tile(p_gradient, s_gradient, begin + i * ROWS, v, R, V, ROWS, DEPTH, TMA)
            right = load_tile(p_gradient, s_gradient, begin + j * ROWS, v, R, V, ROWS, DEPTH, TMA)
            acc = dot(left, right.T, acc, PRECISION)
        tl.store(p_gram + offsets, acc)


@triton.jit(launch_metadata=costs.squares_of_grams)
def _squares_of_grams(
    p_gram,  # [B, L, L]
    p_hidden,  # [R, H]; a descriptor with TMA
    p_starts,  # int32 [B + 1]
    p_out,  # [B, (L / ROWS)^2]
    H,
    R,
    L,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
):
    """out[b, tile] = sum over the tile of gram[b, i, j] (h_i.h_j), twice that below the diagonal.

    Grid: as _gram_of_gradients; tiles above the diagonal and beyond the rows are 0. float32.
    """
    row_tiles = L // ROWS
    i_segment = tl.program_id(0) // (row_tiles * row_tiles)
    i_tile = tl.program_id(0) % (row_tiles * row_tiles)
    i, j = i_tile // row_tiles, i_tile % row_tiles
    begin = tl.load(p_starts + i_segment)
    count = tl.load(p_starts + i_segment + 1) - begin
    if (j <= i) & (i * ROWS < count):
        acc = tl.zeros([ROWS, ROWS], tl.float32)
        for k in range(0, H, DEPTH):
            left = load_tile(p_hidden, H, begin + i * ROWS, k, R, H, ROWS, DEPTH, TMA)
            right = load_tile(p_hidden, H, begin + j * ROWS, k, R, H, ROWS, DEPTH, TMA)
            acc = dot(left, right.T, acc, PRECISION)
        i_rows = i * ROWS + tl.arange(0, ROWS)
        i_columns = j * ROWS + tl.arange(0, ROWS)
        offsets = (i_segment.to(tl.int64) * L + i_rows[:, None]) * L + i_columns[None, :]
        gram = tl.load(p_gram + offsets) * (1.0 / (KEPT_SCALE * KEPT_SCALE))
        mask = (i_rows < count)[:, None] & (i_columns < count)[None, :]
        total = tl.sum(tl.where(mask, acc * gram, 0.0))
        tl.store(p_out + tl.program_id(0), tl.where(i == j, total, 2.0 * total))
    else:
        tl.store(p_out + tl.program_id(0), 0.0)


@triton.jit(launch_metadata=costs.root_of_sums)
def _root_of_sums(p_squares, p_out, tiles, factor, BLOCK: tl.constexpr):
    """out[s] = factor * sqrt(sum over tiles of squares[s]). Grid: segments. float32, fixed order.

    A sum of grams that rounding has left below 0 is 0.
    """
    p_row = p_squares + tl.program_id(0).to(tl.int64) * tiles
    total = tl.zeros([BLOCK], tl.float32)
    for o_tile in range(0, tiles, BLOCK):
        i_tiles = o_tile + tl.arange(0, BLOCK)
        total += tl.load(p_row + i_tiles, mask=i_tiles < tiles, other=0.0)
    square = tl.sum(total, 0)
    square = tl.where(square < 0, 0.0, square)  # and a NaN stays one
    tl.store(p_out + tl.program_id(0), tl.sqrt_rn(square) * factor)


# ---- slices of the logits' gradients ----


class _Rows(NamedTuple):
    """The supervised tokens, segment by segment."""

    work: Work
    starts: Tensor  # int32 [S + 1] the first row of each segment; read on the device alone
    hidden: Tensor  # [R, H], 0 where no token is


def _by_segment(hidden: Tensor, head: Head, offsets: Tensor, multiple: int) -> _Rows:
    """Every segment's rows filled up to a ``multiple`` with token N, whose gradient is 0."""
    n, device = hidden.shape[0], hidden.device
    size = n + (offsets.shape[0] - 1) * (multiple - 1)  # at most
    size = cdiv(size, tuning.ROW_BLOCK) * tuning.ROW_BLOCK
    valid = head.target != head.ignore_index
    before = F.pad(valid.cumsum(0), (1, 0))  # [N + 1] supervised tokens ahead of each
    at = before[offsets]
    filled = (at.diff() + (multiple - 1)) // multiple * multiple
    starts = F.pad(filled.cumsum(0), (1, 0))
    tokens = torch.arange(n, dtype=torch.int32, device=device)
    segment = torch.bucketize(tokens, offsets[1:], right=True)
    place = before[:-1] + (starts - at)[segment]
    index = torch.full((size + 1,), n, dtype=torch.int32, device=device)
    index.scatter_(0, place.where(valid, size), tokens)  # ignored ones all go behind the rest
    index[size:] = n
    rows = hidden.index_select(0, index[:size].clamp(max=n - 1))
    rows.masked_fill_((index[:size] == n).unsqueeze(1), 0)
    starts = starts.to(torch.int32)
    return _Rows(Work(index, starts[-1:].expand(2).contiguous()), starts, rows)


def _known(hidden: Tensor, head: Head) -> tuple[Known, float]:
    """Statistics of N tokens and of token N, whose gradient is 0; and the gradients' unit."""
    nll, lse = _forward(hidden, head)
    factor, unit = None, 1.0
    if hidden.dtype == torch.float16 and head.scale != 0:
        # scaled for small probabilities, a gradient beyond 2 would leave the range
        unit = abs(head.scale)
        factor = nll.new_full((nll.shape[0] + 1,), 1 / unit)
    lse = F.pad(lse, (0, 1), value=torch.inf)  # exp(z - lse) = 0
    return Known(F.pad(nll, (0, 1)), lse, factor, None), unit


def _gradient_slices(
    rows: _Rows, head: Head, known: Known, multiple: int
) -> Iterator[tuple[int, Tensor]]:
    """(first vocabulary entry, gradients [R, width] of the logits): overwritten by the next.

    Entries are taken in multiples of the tiles, so that tiles are the same whatever the slices.
    """
    v, dtype = head.vocabulary, rows.hidden.dtype
    r = rows.hidden.shape[0]
    multiple = max(multiple, settings(head.weight).columns)
    most = max(multiple, tuning.WORKSPACE // (r * dtype.itemsize) // multiple * multiple)
    width = cdiv(cdiv(v, cdiv(v, most)), multiple) * multiple
    kept = rows.hidden.new_empty(r, min(width, cdiv(v, 64) * 64))
    target = F.pad(head.target, (0, 1), value=-1)
    for start in range(0, v, width):
        piece = slice(start, min(start + width, v))
        part = head._replace(
            weight=head.weight[piece],
            target=target - start,  # outside of the slice it is no entry's number
            bias=None if head.bias is None else head.bias[piece],
        )
        gradient = kept[:, : piece.stop - start]
        logit_gradients(rows.hidden, part, rows.work, Chunk(0, r), known, gradient)
        yield start, gradient


# ---- the two ways ----


def _gram_tiles(hidden: Tensor) -> tuning.Tiles:
    where, width = architecture(hidden.device), 64  # the gradients' rows are multiples of it
    return tuning.tiles(tuning.NORM_GRAM, where, hidden.dtype, width)


def gram_is_cheaper(length: int, v: int, h: int, tiles: tuning.Tiles) -> bool:
    """Whether sequences of at most ``length`` tokens take fewer multiplications by their grams.

    By a quarter at least, for the grams' traffic; and the grams of one must fit the workspace.
    """
    row_tiles = cdiv(length, tiles.rows)
    lower = row_tiles * (row_tiles + 1) // 2 * tiles.rows**2
    fits = 4 * (row_tiles * tiles.rows) ** 2 <= tuning.WORKSPACE
    return fits and lower * (v + h) <= 0.75 * length * v * h


def _norms(squares: Tensor, factor: float) -> Tensor:
    number, tiles = squares.shape
    out = squares.new_empty(number)
    launch(_root_of_sums, (number,), squares, out, tiles, factor, BLOCK=1024)
    return out


def _by_product(hidden: Tensor, head: Head, offsets: Tensor) -> Tensor:
    """[S] through tiles of the weight's gradient."""
    dtype, h = hidden.dtype, hidden.shape[1]
    tiles = tuning.tiles(tuning.NORM_PRODUCT, architecture(hidden.device), dtype, h)
    rows = _by_segment(hidden, head, offsets, tiles.depth)
    known, unit = _known(hidden, head)
    number, columns = offsets.shape[0] - 1, cdiv(h, tiles.columns)
    all_tiles = cdiv(head.vocabulary, tiles.rows) * columns
    squares = hidden.new_empty(number, all_tiles, dtype=torch.float32)
    for start, gradient in _gradient_slices(rows, head, known, tiles.rows):
        v = gradient.shape[1]
        launch(
            _squares_of_products,
            (number * cdiv(v, tiles.rows) * columns,),
            operand(gradient, (tiles.depth, tiles.rows), tiles.tma),
            operand(rows.hidden, (tiles.depth, tiles.columns), tiles.tma),
            rows.starts,
            squares,
            v,
            h,
            gradient.stride(0),
            gradient.shape[0],
            start // tiles.rows * columns,
            all_tiles,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            TMA=tiles.tma,
            PRECISION=precision(dtype),
            KEPT_SCALE=KEPT_SCALE[dtype],
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return _norms(squares, unit)


def _by_gram(hidden: Tensor, head: Head, offsets: Tensor, length: int) -> Tensor:
    """[B] through the products of all pairs of a sequence's tokens, ``length`` at most."""
    dtype, number = hidden.dtype, offsets.shape[0] - 1
    tiles = _gram_tiles(hidden)
    rows = _by_segment(hidden, head, offsets, 1)
    known, unit = _known(hidden, head)
    row_tiles = cdiv(length, tiles.rows)
    side = row_tiles * tiles.rows
    gram = hidden.new_empty(number, side, side, dtype=torch.float32)
    r, h = rows.hidden.shape
    for start, gradient in _gradient_slices(rows, head, known, tiles.depth):
        launch(
            _gram_of_gradients,
            (number * row_tiles**2,),
            operand(gradient, (tiles.rows, tiles.depth), tiles.tma),
            rows.starts,
            gram,
            gradient.shape[1],
            gradient.stride(0),
            r,
            side,
            FIRST=start == 0,
            ROWS=tiles.rows,
            DEPTH=tiles.depth,
            TMA=tiles.tma,
            PRECISION=precision(dtype),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    tiles = tuning.tiles(tuning.NORM_PAIRS, architecture(hidden.device), dtype, h)
    squares = hidden.new_empty(number, (side // tiles.rows) ** 2, dtype=torch.float32)
    launch(
        _squares_of_grams,
        (squares.numel(),),
        gram,
        operand(rows.hidden, (tiles.rows, tiles.depth), tiles.tma),
        rows.starts,
        squares,
        h,
        r,
        side,
        ROWS=tiles.rows,
        DEPTH=tiles.depth,
        TMA=tiles.tma,
        PRECISION=precision(dtype),
        KEPT_SCALE=KEPT_SCALE[dtype],
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return _norms(squares, unit)


@torch.no_grad()
def linear_nll_grad_norms(
    hidden, weight, target, bias, offsets, length, softcap, scale, ignore_index
) -> Tensor:
    """float32 [S]. ``length``: that of every segment, or 0 where only the device knows."""
    number = offsets.shape[0] - 1
    if number == 0 or hidden.shape[0] == 0:
        return hidden.new_zeros(number, dtype=torch.float32)
    head = _head(weight, target, bias, softcap, scale, ignore_index)
    rows = _rows(hidden)
    tiles = _gram_tiles(rows)
    v, h = head.weight.shape
    if not length or not gram_is_cheaper(length, v, h, tiles):
        return _by_product(rows, head, offsets)
    # as many sequences at a time as the workspace holds grams of
    side = cdiv(length, tiles.rows) * tiles.rows
    most = max(1, tuning.WORKSPACE // (4 * side * side))
    most = cdiv(number, cdiv(number, most))
    norms = []
    for first in range(0, number, most):
        last = min(first + most, number)
        tokens = slice(first * length, last * length)
        group = head._replace(target=head.target[tokens])
        norms.append(_by_gram(rows[tokens], group, offsets[: last - first + 1], length))
    return torch.cat(norms)
