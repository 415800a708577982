"""Raw operators of the linear head, over N rows. ``softcap`` 0 means none; an unwanted gradient is
[0].

They carry no derivative formulas but those that torch.compile needs: under forward AD they would
lose the tangent without a word, so they raise on dual tensors. The public functions are the way in.
"""

import torch
from torch import Tensor

from vcore_kernels._library import INTERPRETED, define, no_derivative
from vcore_kernels.backends import triton
from vcore_kernels.backends.reference import statistics_dtype


def _statistics(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=statistics_dtype(hidden.dtype))


def _wanted(like: Tensor, wanted: bool) -> Tensor:
    return (
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if wanted
        else like.new_empty(0)
    )


def fake_forward(hidden, weight, target, bias, softcap, scale, ignore_index, keep_rows):
    rows = _wanted(hidden, keep_rows)
    if hidden.dtype == torch.float16 and keep_rows:
        rows = rows.float()
    nll = _statistics(hidden)
    return nll, nll.new_empty((2, *nll.shape)), rows


def _fake_backward(
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
):
    return (
        _wanted(hidden, need_hidden),
        _wanted(weight, need_weight),
        _wanted(bias, True) if need_bias and bias is not None else hidden.new_empty(0),
    )


def fake_weighted(
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
):
    statistics = _statistics(hidden)
    wide = hidden.float() if hidden.dtype == torch.float16 else hidden
    return (
        statistics,
        _wanted(wide, need_hidden),
        _wanted(weight, need_weight).to(
            weight.dtype if writes_weight_gradient_directly(hidden, weight) else statistics.dtype
        ),
        _wanted(weight[:, 0], need_bias).to(statistics.dtype),
    )


def writes_weight_gradient_directly(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the Triton kernels form d_weight from one chunk, and so need no float32 accumulator.

    The chunk's exponentials, 2*N*V bytes, then take no more than that accumulator, 4*V*H, would.
    """
    ours = hidden.device.type == "cuda" or INTERPRETED
    return ours and weight.dtype == torch.bfloat16 and hidden.shape[0] <= 2 * weight.shape[1]


def _fake_two_losses(hidden, *_):
    return _statistics(hidden), _statistics(hidden)


_HEAD = "Tensor hidden, Tensor weight, Tensor target"
_OPTIONS = "float softcap, float scale, int ignore_index"
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"

define(
    f"linear_nll_forward({_HEAD}, Tensor? bias, {_OPTIONS}, bool keep_rows)"
    " -> (Tensor nll, Tensor lse, Tensor rows)",
    fake_forward,
)
define(
    f"linear_nll_backward(Tensor grad_nll, {_HEAD}, Tensor? bias, Tensor nll, Tensor lse,"
    f" {_OPTIONS}, {_NEEDS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
define(
    f"weighted_linear_nll_forward({_HEAD}, Tensor token_weight, Tensor? bias, {_OPTIONS}, {_NEEDS})"
    " -> (Tensor nll, Tensor, Tensor, Tensor)",
    fake_weighted,
)
define(
    f"linear_nll_jvp({_HEAD}, Tensor hidden_tangent, Tensor? weight_tangent, Tensor? bias,"
    f" Tensor? bias_tangent, {_OPTIONS}) -> (Tensor nll, Tensor nll_tangent)",
    _fake_two_losses,
)
define(
    f"linear_nll_pair({_HEAD}, Tensor hidden_perturbed, Tensor? weight_perturbed, Tensor? bias,"
    f" Tensor? bias_perturbed, {_OPTIONS}) -> (Tensor nll, Tensor difference)",
    _fake_two_losses,
)
define(
    "scale_cast(Tensor x, Tensor factor, ScalarType dtype) -> Tensor",
    lambda x, _, dtype: torch.empty_like(x, dtype=dtype),
)
define("set_bf16_engine(str engine) -> bool", compiled=False)

_OPERATORS = (
    "linear_nll_forward",
    "linear_nll_backward",
    "weighted_linear_nll_forward",
    "linear_nll_jvp",
    "linear_nll_pair",
    "scale_cast",
)
for _name in _OPERATORS:
    no_derivative(_name)
triton.implement("head", *_OPERATORS)
