"""Norm of the gradient of a linear head's weight, for each sequence."""

import torch
from torch import Tensor

from vcore_kernels._head import HeadOptions, head_rows
from vcore_kernels._library import LIBRARY, define, no_derivative
from vcore_kernels.backends import reference, resolve, triton
from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.segments import make_segments
from vcore_kernels.spans import spanned


def _fake(hidden, weight, target, bias, offsets, length, softcap, scale, ignore_index):
    number = offsets.shape[0] - 1
    return hidden.new_empty(number, dtype=statistics_dtype(hidden.dtype))


_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor offsets, SymInt length,"
    " float softcap, float scale, int ignore_index) -> Tensor"
)
define(f"linear_nll_grad_norms{_SCHEMA}", _fake)
define(f"linear_nll_grad_norms_reference{_SCHEMA}", _fake, compiled=False)
LIBRARY.impl(
    "linear_nll_grad_norms_reference",
    reference.linear_nll_grad_norms,
    "CompositeExplicitAutograd",
)
for _name in ("linear_nll_grad_norms", "linear_nll_grad_norms_reference"):
    no_derivative(_name)
triton.implement("head_norms", "linear_nll_grad_norms")


@spanned
def linear_nll_grad_norms(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
) -> Tensor:
    """Frobenius norm, for each sequence, of the gradient of its log-probability by ``weight``.

    The log-probability of a sequence is the sum over its supervised tokens, and its gradient
    ``sum_t (softmax(logits_t) - onehot(target_t)) (x) hidden_t`` up to the sign, with the factors
    of ``scale`` and ``softcap``. Neither the N x V logits nor a V x H gradient is stored. The
    compiled and Triton kernels take three products of N x V x H; compiled ones two for sequences
    of which 64 MiB hold the exponentials, Triton's less for padded sequences clearly shorter than
    H. The reference holds the logits of one sequence at a time. No gradient flows.

    Args:
        hidden: [B, T, H], a sequence a row; [T, H], one sequence; or with ``cu_seqlens`` packed
            [N, H] or [1, N, H]. float32, float64, bfloat16 or float16.
        weight: [V, H], the dtype of ``hidden``. Under autocast both are cast as for a linear layer.
        target: [B, T], [T] or packed; int64 in [0, V) or ``ignore_index``, which counts nothing.
            ``shift=1``: labels, as in :func:`vcore_kernels.linear_nll`; the first label of a
            sequence has no prediction and counts nothing.
        cu_seqlens: int32 or int64 [S + 1] from 0 to N; equal neighbours make an empty sequence.
        bias, softcap, scale, backend, debug: as in :func:`vcore_kernels.linear_nll`.

    Returns:
        [S], S sequences; float32, or float64 for float64 input. 0 for a sequence without a
        supervised token. Squares are summed: a float32 norm below 1e-19 is 0.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, or a target outside the
            vocabulary.
        BackendError: a named backend that cannot serve the call.

    Source: G of GVM (arXiv 2505.02391) with W the output head; docs/design.md.
    """
    op = "linear_nll_grad_norms"
    options = HeadOptions(softcap, scale, ignore_index)
    rows = head_rows(op, hidden, weight, target, bias, options, shift, debug)
    segments = make_segments(op, target, cu_seqlens=cu_seqlens)
    labels, length = rows.target, 0
    if cu_seqlens is None:
        length = target.shape[-1]
    elif shift and segments.size:
        # the last token of a sequence does not predict the first of the next
        last = (segments.offsets[1:] - 1) % segments.size
        labels = labels.index_fill(0, last, ignore_index)
    ops = torch.ops.vcore_kernels
    run = ops.linear_nll_grad_norms
    if resolve(op, backend, *rows.tensors()) == "reference":
        run = ops.linear_nll_grad_norms_reference
    head = (rows.hidden, rows.weight, labels, rows.bias)
    return run(*head, segments.offsets, length, *options.raw())
