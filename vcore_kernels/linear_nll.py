"""Per-token negative log-likelihood of a linear head, without the N x V logits."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcore_kernels import _head_ops, vocab_parallel
from vcore_kernels._head import (
    HeadOptions,
    head_rows,
    to_labels,
    vmap_error,
    without_second_derivative,
)
from vcore_kernels._library import define, differentiable
from vcore_kernels.backends import reference, resolve
from vcore_kernels.spans import spanned

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.vcore_kernels


_guard = partial(without_second_derivative, "linear_nll")


class _LinearNll(torch.autograd.Function):
    """nll, and for backward: the log-sum-exp, and with ``keep_rows`` the rows d nll_n / d hidden_n.

    With kept rows (a frozen head) backward is one multiplication; otherwise it forms the logits
    again.
    """

    @staticmethod
    def forward(hidden, weight, target, bias, softcap, scale, ignore_index, keep_rows):
        return _ops.linear_nll_forward(
            hidden, weight, target, bias, softcap, scale, ignore_index, keep_rows
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, target, bias, *ctx.options, ctx.keep_rows = inputs
        nll, lse, rows = output
        ctx.mark_non_differentiable(lse, rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, target, bias, nll, lse, rows)
        ctx.save_for_forward(hidden, weight, target, bias)

    @staticmethod
    def backward(ctx, grad_nll, *_):
        if grad_nll is None:
            return (None,) * 8
        hidden, weight, target, bias, nll, lse, rows = ctx.saved_tensors
        if ctx.keep_rows:
            d_hidden = _ops.scale_cast(rows, grad_nll, hidden.dtype)
            return _guard(d_hidden, hidden, weight, bias, grad_nll), *(None,) * 7
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        grads = _ops.linear_nll_backward(
            grad_nll,
            hidden,
            weight,
            target,
            bias,
            nll,
            lse,
            *ctx.options,
            need_hidden,
            need_weight,
            need_bias,
        )
        d_hidden, d_weight, d_bias = (
            _guard(grad, hidden, weight, bias, grad_nll) if need else None
            for grad, need in zip(grads, (need_hidden, need_weight, need_bias), strict=True)
        )
        return d_hidden, d_weight, None, d_bias, None, None, None, None

    @staticmethod
    def jvp(ctx, d_hidden, d_weight, _target, d_bias, *_):
        hidden, weight, target, bias = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if d_hidden is None else d_hidden
        _, tangent = _ops.linear_nll_jvp(
            hidden, weight, target, d_hidden, d_weight, bias, d_bias, *ctx.options
        )
        return _guard(tangent, hidden, weight, bias), None, None

    @staticmethod
    def vmap(*_):
        raise vmap_error("linear_nll")


define(
    "linear_nll(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float softcap,"
    " float scale, int ignore_index, bool keep_rows) -> (Tensor nll, Tensor lse, Tensor rows)",
    _head_ops.fake_forward,
    compiled=False,
)
differentiable("linear_nll", _LinearNll, _ops.linear_nll_forward)


@spanned
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Cross-entropy of each token under a linear head: ``-log softmax(logits)[target]``, in nats.

    ``logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, never stored.
    Differentiable in ``hidden``, ``weight`` and ``bias`` for any upstream gradient (which *is* the
    weight of each token), in reverse and in forward mode (``torch.func.jvp``,
    ``torch.autograd.forward_ad``), and under ``torch.compile(fullgraph=True)``. Rows whose target
    is ``ignore_index`` cost no matrix product, rows whose upstream gradient is zero none in
    backward.

    In products of N x V x H: 1 forward; with a frozen head 2 in all (forward keeps the rows
    d nll / d hidden), with a trained head 4. With weights known beforehand
    :func:`vcore_kernels.weighted_linear_nll` needs 2 and 3.

    The vocabulary may be sharded over processes (tensor parallelism): ``weight`` and ``bias``
    are then DTensors placed as Shard(0) over one dimension of their mesh and Replicate over the
    others, or with ``group`` the rows of this process. Shards may differ in size or be empty. All
    processes pass the same ``hidden`` and ``target``, get the same result, and must differentiate
    the same function of it. Products are shared out evenly; neither logits nor weight are
    gathered. Forward has two all-reduces, of [N] and of [3, N] float64 numbers (with ``group`` also
    one of the shards' sizes), backward one of d_hidden, [N, H] in float32 (float64 for
    float64); gradients of ``weight`` and ``bias`` stay where the shards are. Second derivatives are
    refused whatever the backend, and under ``torch.compile`` such a call breaks the graph. In
    forward mode a DTensor has no tangent, as PyTorch cannot make it one; a shard with ``group``
    can.

    Args:
        hidden: [..., H], float32, float64, bfloat16 or float16; the dtype of the products.
            Accumulation is float32 (float64 for float64).
        weight: [V, H], the dtype of ``hidden``. Under autocast both are cast as for a linear layer.
        target: [...] int64 in [0, V) or ``ignore_index``. With ``shift=1`` the labels of a language
            model: ``nll[..., t]`` is the loss of label t, predicted from ``hidden[..., t - 1]``;
            position 0 gives 0. In a packed batch the first label of each further segment must be
            ``ignore_index``.
        bias: [V] or None.
        softcap: Bound of the logits (Gemma 2), or None.
        scale: Factor on the logits, before the soft cap.
        backend: "auto", or one of :func:`vcore_kernels.backends`.
        debug: Wait for an accelerator's check that targets lie in the vocabulary (a CPU always
            checks).
        group: Process group over which the vocabulary is sharded. ``weight`` and ``bias`` are then
            this process's rows, in the order of the group's ranks, and may differ in number.

    Returns:
        nll, shaped like ``target``; float32, or float64 for float64 input. 0 where ignored. With
        the compiled and the Triton kernels the nll of a token does not depend on the batch around
        it, bit for bit.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or placements that do not fit, or a target
            outside the vocabulary.
        BackendError: a named backend that cannot serve the call.

    Source: docs/design.md; the online log-sum-exp is Milakov and Gimelshein (arXiv 1805.02867).
    """
    op = "linear_nll"
    options = HeadOptions(softcap, scale, ignore_index)
    shard, weight, bias, hidden, target = vocab_parallel.localize(
        op, group, weight, bias, hidden=hidden, target=target
    )
    args = (hidden, weight, target, bias, options, shift)
    if shard is not None:
        return vocab_parallel.linear_nll(op, shard, *args, backend, debug)
    rows = head_rows(op, *args, debug)
    if resolve(op, backend, *rows.tensors()) == "reference":
        nll = reference.linear_nll(*rows, softcap, scale, ignore_index)
    else:
        head_frozen = not rows.weight.requires_grad and not (
            rows.bias is not None and rows.bias.requires_grad
        )
        keep_rows = torch.is_grad_enabled() and rows.hidden.requires_grad and head_frozen
        call = _ops.linear_nll if torch.compiler.is_compiling() else _LinearNll.apply
        nll = call(*rows, *options.raw(), keep_rows)[0]
    return to_labels(nll, target.shape, shift)
