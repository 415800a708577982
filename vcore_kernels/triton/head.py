"""The raw operators of the linear head: chunks of tokens through the kernels of head_*.py.

A chunk's sweep over the weight forms tiles of logits and leaves of each its softmax statistics and,
where gradients are wanted, the exponentials in the operands' dtype (one product). A pass over these
alone turns them into the logits' gradients, from which d_hidden and d_weight are a product each: 2
products with a frozen head, 3 with a trained one. Late weights with a trained head form the logits
again in backward: 4. No logit is rounded before its exponential, and nothing is read back from the
device.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels._head_ops import writes_weight_gradient_directly
from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import architecture, cast, cdiv, launch
from vcore_kernels.triton.head_gradients import bias_gradient, hidden_gradient, weight_gradient
from vcore_kernels.triton.head_logits import (
    Second,
    logit_gradients,
    products_of,
    settings,
    statistics_of,
)
from vcore_kernels.triton.head_rows import (
    Chunk,
    Head,
    Known,
    Work,
    chunks,
    gather,
    logit_gradients_from_kept,
    order_of_work,
    row_statistics,
)


def _head(weight, target, bias, softcap: float, scale: float, ignore_index: int) -> Head:
    bias = None if bias is None else bias.contiguous()
    return Head(_product_ready(weight), target.contiguous(), bias, softcap, scale, ignore_index)


def _product_ready(matrix: Tensor) -> Tensor:
    """A matrix as products want it, itself wherever possible.

    Its rows are contiguous, aligned where the copy engine could serve their width, and not empty: a
    width of 0 becomes 16 zeros.
    """
    if matrix.shape[1] == 0:
        return F.pad(matrix, (0, 16))
    row_bytes = matrix.stride(0) * matrix.element_size()
    aligned = row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0
    overlapping = matrix.stride(0) < matrix.shape[1] and matrix.shape[0] > 1
    needs = tuning.copy_engine_serves(matrix.shape[1], matrix.dtype)
    if matrix.stride(1) != 1 or (needs and (overlapping or not aligned)):
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix


def _rows(hidden: Tensor) -> Tensor:
    """``hidden`` as it is, in any strides; a width of 0 becomes 16 zeros."""
    return hidden if hidden.shape[1] else F.pad(hidden, (0, 16))


def _new_statistics(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """nll [N] and lse [2, N]: the largest logit, and what the log-sum-exp adds to it."""
    n = hidden.shape[0]
    return hidden.new_zeros(n, dtype=torch.float32), hidden.new_zeros(2, n, dtype=torch.float32)


def _chunks_of_statistics(
    hidden: Tensor, head: Head, products: str, statistics: int, gathered: int
) -> list[Chunk]:
    """Chunks that keep ``statistics`` of each part of a tile and gather their rows so often."""
    tiles = settings(head.weight, products)
    number = cdiv(head.vocabulary, tiles.columns) * tiles.parts
    row_bytes = statistics * number * 4 + gathered * hidden.shape[1] * hidden.element_size()
    return chunks(hidden.shape[0], row_bytes, tuning.STATISTICS)


class _Gradients:
    """The wanted gradients of a call, chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        factor: Tensor | None,  # [N]
        needs: tuple[bool, bool, bool],  # hidden, weight, bias
        hidden_dtype: torch.dtype,
    ):
        self.source, self.head = hidden, head
        n, (v, h) = hidden.shape[0], head.weight.shape
        need_hidden, need_weight, need_bias = needs
        direct = need_weight and writes_weight_gradient_directly(hidden, head.weight)
        weight_dtype = head.weight.dtype if direct else torch.float32
        # the first chunk writes every element of d_weight and d_bias; of d_hidden, a chunk its rows
        fresh = torch.empty if n else torch.zeros
        device = hidden.device
        self.hidden = torch.zeros(n, h, dtype=hidden_dtype, device=device) if need_hidden else None
        self.weight = fresh(v, h, dtype=weight_dtype, device=device) if need_weight else None
        self.bias = fresh(v, dtype=torch.float32, device=device) if need_bias else None
        # float16 products in units of the largest factor times the scale of the logits: small or
        # large ones would leave its range
        self.unit = None
        if hidden.dtype == torch.float16 and n and (factor is not None or head.scale != 1):
            one = torch.ones((), device=device)
            unit = (one if factor is None else factor.abs().amax()) * (abs(head.scale) or 1.0)
            self.unit = unit.clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
        row_bytes = v * hidden.element_size()
        limit = tuning.WORKSPACE
        if direct:
            limit = (n + tuning.ROW_BLOCK) * row_bytes  # one chunk
        self.chunks = chunks(n, row_bytes, limit)
        rows = self.chunks[0].rows if self.chunks else 0
        # strides in multiples of 128 bytes, so that the copy engine serves any V
        kept = torch.empty(rows, cdiv(v, 64) * 64, dtype=hidden.dtype, device=device)
        self.logits = kept[:, :v]

    def add(self, chunk: Chunk, work: Work, live: Tensor | None = None) -> None:
        """The products of ``logits``, which now hold the chunk's gradients.

        ``live``: the chunk's rows of hidden that have a gradient, where they are at hand.
        """
        args = (work, chunk, self.unit)
        if self.hidden is not None:
            hidden_gradient(self.logits, self.head.weight, self.hidden, *args)
        if self.weight is not None:
            if live is None:  # rows without a gradient must be 0 here, whatever they hold
                live = gather(self.source, work, chunk, live=True)
            weight_gradient(self.logits, live, self.weight, *args)
        if self.bias is not None:
            bias_gradient(self.logits, self.bias, *args)

    def results(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias; [0] where not wanted."""
        empty = self.source.new_empty

        def narrow(x: Tensor | None, dtype: torch.dtype) -> Tensor:
            return empty(0, dtype=dtype) if x is None else x[:, :width].contiguous()

        bias = empty(0, dtype=torch.float32) if self.bias is None else self.bias
        return (narrow(self.hidden, self.source.dtype), narrow(self.weight, torch.float32), bias)


def _forward_with_gradients(
    hidden: Tensor,
    head: Head,
    factor: Tensor | None,
    gradients: _Gradients,
) -> tuple[Tensor, Tensor]:
    """nll and lse; ``gradients`` are those of sum(factor * nll)."""
    nll, lse = _new_statistics(hidden)
    work = order_of_work(head.target, head.ignore_index, factor)
    settled = settings(head.weight)
    for chunk in gradients.chunks:
        rows = gather(hidden, work, chunk)
        tiles = statistics_of("keep", rows, head, work, chunk, kept=gradients.logits)
        row_statistics(tiles, work, chunk, nll, lse)
        known = Known(nll, lse, factor, gradients.unit)
        logit_gradients_from_kept(gradients.logits, tiles, work, chunk, head, known, settled.part)
        gradients.add(chunk, work)
    return nll, lse


def _forward(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    nll, lse = _new_statistics(hidden)
    work = order_of_work(head.target, head.ignore_index)
    for chunk in _chunks_of_statistics(hidden, head, "one", 2, 1):
        rows = gather(hidden, work, chunk)
        row_statistics(statistics_of("losses", rows, head, work, chunk), work, chunk, nll, lse)
    return nll, lse


def linear_nll_forward(
    hidden, weight, target, bias, softcap, scale, ignore_index, keep_rows
) -> tuple[Tensor, Tensor, Tensor]:
    """nll, lse, and the rows d nll / d hidden (float32 for float16, where they may underflow)."""
    head = _head(weight, target, bias, softcap, scale, ignore_index)
    rows = _rows(hidden)
    if not keep_rows:
        return *_forward(rows, head), hidden.new_empty(0)
    needs = (True, False, False)
    gradients = _Gradients(rows, head, None, needs, _wide(hidden.dtype))
    nll, lse = _forward_with_gradients(rows, head, None, gradients)
    return nll, lse, gradients.results(hidden.shape[1])[0]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def linear_nll_backward(
    grad_nll,
    hidden,
    weight,
    target,
    bias,
    nll,
    lse,
    softcap,
    scale,
    ignore_index,
    need_hidden,
    need_weight,
    need_bias,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight, d_bias of sum(grad_nll * nll) in the dtypes of hidden, weight, bias."""
    head = _head(weight, target, bias, softcap, scale, ignore_index)
    rows, factor = _rows(hidden), grad_nll.to(torch.float32).contiguous()
    needs = (need_hidden, need_weight, need_bias and bias is not None)
    gradients = _Gradients(rows, head, factor, needs, hidden.dtype)
    work = order_of_work(head.target, head.ignore_index, factor)
    known = Known(nll.contiguous(), lse.contiguous(), factor, gradients.unit)
    for chunk in gradients.chunks:
        live = gather(rows, work, chunk, live=True)
        logit_gradients(live, head, work, chunk, known, gradients.logits)
        gradients.add(chunk, work, live)
    d_hidden, d_weight, d_bias = gradients.results(hidden.shape[1])
    if bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, d_weight.to(weight.dtype), d_bias


def weighted_linear_nll_forward(
    hidden,
    weight,
    target,
    token_weight,
    bias,
    softcap,
    scale,
    ignore_index,
    need_hidden,
    need_weight,
    need_bias,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, and the gradients of sum(token_weight * nll), before the upstream gradient."""
    head = _head(weight, target, bias, softcap, scale, ignore_index)
    rows, factor = _rows(hidden), token_weight.contiguous()
    needs = (need_hidden, need_weight, need_bias and bias is not None)
    if not any(needs):
        nll = _forward(rows, head)[0]
        dtypes = (_wide(hidden.dtype), torch.float32, torch.float32)
        return nll, *(hidden.new_empty(0, dtype=dtype) for dtype in dtypes)
    gradients = _Gradients(rows, head, factor, needs, _wide(hidden.dtype))
    nll, _ = _forward_with_gradients(rows, head, factor, gradients)
    return nll, *gradients.results(hidden.shape[1])


def linear_nll_jvp(
    hidden,
    weight,
    target,
    hidden_tangent,
    weight_tangent,
    bias,
    bias_tangent,
    softcap,
    scale,
    ignore_index,
) -> tuple[Tensor, Tensor]:
    """nll and its derivative along the tangents."""
    head = _head(weight, target, bias, softcap, scale, ignore_index)
    beside = None if weight_tangent is None else _product_ready(weight_tangent)
    return _two_points("jvp", hidden, head, hidden_tangent, beside, bias_tangent)


def linear_nll_pair(
    hidden,
    weight,
    target,
    hidden_perturbed,
    weight_perturbed,
    bias,
    bias_perturbed,
    softcap,
    scale,
    ignore_index,
) -> tuple[Tensor, Tensor]:
    """nll, and by how much it exceeds the perturbed one.

    z' - z = (h' - h) w + h' (w' - w): differences are taken between inputs and rounded once to
    their dtype.
    """
    head = _head(weight, target, bias, softcap, scale, ignore_index)
    beside = None if weight_perturbed is None else _product_ready(weight_perturbed)
    if bias_perturbed is not None:  # -inf, a masked class, less itself is no change
        change = bias_perturbed.float() - bias.float()
        bias_perturbed = torch.where(bias_perturbed == bias, 0, change)
    return _two_points("pair", hidden, head, hidden_perturbed, beside, bias_perturbed)


def _two_points(mode, hidden, head, second_hidden, second_weight, second_bias):
    hidden, second_hidden = _rows(hidden), _rows(second_hidden)
    second_bias = None if second_bias is None else second_bias.contiguous()
    nll, lse = _new_statistics(hidden)
    other = torch.zeros_like(nll)
    work = order_of_work(head.target, head.ignore_index)
    products = products_of(mode, second_weight)
    statistics, gathered = (3, 2) if mode == "jvp" else (5, 3)
    for chunk in _chunks_of_statistics(hidden, head, products, statistics, gathered):
        rows = gather(hidden, work, chunk)
        if mode == "jvp":
            beside, right = gather(second_hidden, work, chunk), None
        else:
            beside = gather(second_hidden, work, chunk, minus=hidden)
            right = None if second_weight is None else gather(second_hidden, work, chunk)
        second = Second(beside, right, second_weight, second_bias)
        tiles = statistics_of(mode, rows, head, work, chunk, second)
        row_statistics(tiles, work, chunk, nll, lse, mode, other)
        del rows, second, beside, right, tiles  # before the next chunk has its own
    return nll, other


# ---- scale_cast ----


@triton.jit(launch_metadata=costs.scale_cast)
def _scale_cast(
    p_x,  # [N, H] of strides s_row, s_column
    p_factor,  # [N] or [1]
    p_out,  # [N, H]
    N,
    H,
    s_row,
    s_column,
    s_factor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = x * factor, rounded once; with a factor for each row, 0 where that is 0.

    Grid: (row tiles, column tiles).
    """
    i_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    m_rows = i_rows < N
    mask = m_rows[:, None] & (i_columns < H)[None, :]
    factor = tl.load(p_factor + i_rows * s_factor, mask=m_rows, other=0.0).to(tl.float32)
    offsets = i_rows[:, None] * s_row + i_columns[None, :] * s_column
    x = tl.load(p_x + offsets, mask=mask, other=0.0).to(tl.float32) * factor[:, None]
    if s_factor != 0:
        x = tl.where(factor[:, None] == 0, 0.0, x)
    out = cast(x, p_out.dtype.element_ty)
    tl.store(p_out + i_rows[:, None] * H + i_columns[None, :], out, mask=mask)


def scale_cast(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor as dtype. factor is 0-dim, or one for each row of x [N, H]."""
    by_row = factor.dim() == 1
    if not (factor.dim() == 0 or (x.dim() == 2 and factor.shape == x.shape[:1])):
        raise ValueError(f"scale_cast: factor {list(factor.shape)} does not fit {list(x.shape)}")
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel() == 0:
        return out
    matrix = x if x.dim() == 2 else x.reshape(1, -1)
    n, h = matrix.shape
    columns = min(1024, triton.next_power_of_2(h))
    rows = tuning.elements(architecture(x.device)) // columns
    launch(
        _scale_cast,
        (cdiv(n, rows), cdiv(h, columns)),
        matrix,
        factor,
        out,
        n,
        h,
        *matrix.stride(),
        factor.stride(0) if by_row else 0,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
    return out
