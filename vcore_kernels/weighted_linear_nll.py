"""Weighted sum of per-token losses whose weights are known before the pass."""

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vcore_kernels import _head_ops, vocab_parallel
from vcore_kernels._head import (
    HeadOptions,
    head_rows,
    to_labels,
    to_rows,
    vmap_error,
    without_second_derivative,
)
from vcore_kernels._library import define, differentiable
from vcore_kernels.backends import reference, resolve
from vcore_kernels.spans import spanned

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.vcore_kernels
_guard = partial(without_second_derivative, "weighted_linear_nll")


class _WeightedLinearNll(torch.autograd.Function):
    """(nll, loss, d_hidden, d_weight, d_bias): the gradients of the loss are formed in forward."""

    @staticmethod
    def forward(hidden, weight, target, token_weight, *rest):
        nll, *grads = _ops.weighted_linear_nll_forward(hidden, weight, target, token_weight, *rest)
        return weighted_sum(token_weight, nll), nll, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, target, token_weight, bias, *ctx.options, need_h, need_w, need_b = inputs
        _, nll, *grads = output
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.needed = (need_h, need_w, need_b)
        ctx.mark_non_differentiable(nll, *grads)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, *grads)
        ctx.save_for_forward(hidden, weight, target, token_weight, bias)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 11
        *inputs, d_hidden, d_weight, d_bias = ctx.saved_tensors
        grads = zip((d_hidden, d_weight, d_bias), ctx.dtypes, ctx.needed, strict=True)
        d_hidden, d_weight, d_bias = (
            _guard(_ops.scale_cast(grad, grad_loss, dtype), *inputs, grad_loss) if need else None
            for grad, dtype, need in grads
        )
        return d_hidden, d_weight, None, None, d_bias, *(None,) * 6

    @staticmethod
    def jvp(ctx, d_hidden, d_weight, _target, _token_weight, d_bias, *_):
        hidden, weight, target, token_weight, bias = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if d_hidden is None else d_hidden
        _, tangent = _ops.linear_nll_jvp(
            hidden, weight, target, d_hidden, d_weight, bias, d_bias, *ctx.options
        )
        tangent = _guard(weighted_sum(token_weight, tangent), hidden, weight, bias)
        return tangent, None, None, None, None

    @staticmethod
    def vmap(*_):
        raise vmap_error("weighted_linear_nll")


def weighted_sum(token_weight: Tensor, nll: Tensor) -> Tensor:
    """sum of token_weight * nll, where a row of weight 0 counts 0 whatever its loss."""
    return (token_weight * nll).where(token_weight != 0, 0).sum()


define(
    "weighted_linear_nll(Tensor hidden, Tensor weight, Tensor target, Tensor token_weight,"
    " Tensor? bias, float softcap, float scale, int ignore_index, bool need_hidden,"
    " bool need_weight, bool need_bias)"
    " -> (Tensor loss, Tensor nll, Tensor, Tensor, Tensor)",
    lambda *args: (
        args[0].new_empty((), dtype=reference.statistics_dtype(args[0].dtype)),
        *_head_ops.fake_weighted(*args),
    ),
    compiled=False,
)
differentiable("weighted_linear_nll", _WeightedLinearNll, _WeightedLinearNll.forward)


@spanned
def weighted_linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    backend: str = "auto",
    debug: bool = False,
    group: "ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """``sum(token_weight * nll)`` with the gradients formed in the forward pass, while the logits
    are at hand.

    In products of N x V x H, forward and backward together: 2 with a frozen head, 3 with a trained
    one. Rows of weight 0 cost one product for their loss and none for gradients. ``token_weight``
    is a constant: no gradient flows into it.

    A head sharded along the vocabulary is served as by :func:`vcore_kernels.linear_nll`, which it
    then is with these weights: a shard's gradients need the softmax of all, so the products are
    that function's 2 and 4.

    Args:
        token_weight: shaped like ``target`` (with ``shift=1``: the weight of label t stands at t);
            any sign, finite; put alpha * q * n / num_items here.
        other arguments, ``group`` included: as in :func:`vcore_kernels.linear_nll`.

    Returns:
        (loss, nll): the 0-dim weighted sum, and the detached per-token losses shaped like
        ``target``, given for every supervised row, zero-weight rows included. float32, or float64
        for float64 input. Where every row is ignored the loss is a zero that is still connected to
        the graph.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or placements that do not fit, or a target
            outside the vocabulary.
        BackendError: a named backend that cannot serve the call.
    """
    op = "weighted_linear_nll"
    options = HeadOptions(softcap, scale, ignore_index)
    shard, weight, bias, hidden, target, token_weight = vocab_parallel.localize(
        op, group, weight, bias, hidden=hidden, target=target, token_weight=token_weight
    )
    args = (hidden, weight, target, bias, options, shift)
    if shard is not None:
        nll = vocab_parallel.linear_nll(op, shard, *args, backend, debug)
        _check_token_weight(op, token_weight, target)
        return weighted_sum(token_weight.detach().to(nll.dtype), nll), nll.detach()
    rows = head_rows(op, *args, debug)
    _check_token_weight(op, token_weight, target)
    weights = to_rows(token_weight.detach(), shift).to(
        reference.statistics_dtype(rows.hidden.dtype)
    )
    if resolve(op, backend, *rows.tensors(), weights) == "reference":
        nll = reference.linear_nll(*rows, softcap, scale, ignore_index)
        loss, nll = weighted_sum(weights, nll), nll.detach()
    else:
        trains = torch.is_grad_enabled()
        needs = [
            trains and t is not None and t.requires_grad
            for t in (rows.hidden, rows.weight, rows.bias)
        ]
        call = (
            _ops.weighted_linear_nll if torch.compiler.is_compiling() else _WeightedLinearNll.apply
        )
        loss, nll, *_ = call(
            rows.hidden, rows.weight, rows.target, weights, rows.bias, *options.raw(), *needs
        )
    return loss, to_labels(nll, target.shape, shift)


def _check_token_weight(op: str, token_weight: Tensor, target: Tensor) -> None:
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"{op}: token_weight must be a tensor, got {type(token_weight).__name__}.")
    if token_weight.device != target.device:
        raise ValueError(f"{op}: token_weight is on {token_weight.device}, not {target.device}.")
    if token_weight.shape != target.shape:
        raise ValueError(
            f"{op}: token_weight has shape {list(token_weight.shape)}, target "
            f"{list(target.shape)}. Pass one weight for each target."
        )
    if token_weight.is_complex() or token_weight.dtype == torch.bool:
        raise TypeError(f"{op}: token_weight must be a real number, got {token_weight.dtype}.")
