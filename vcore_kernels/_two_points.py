"""What linear_nll_jvp and linear_nll_pair share: a second value beside each input."""

from typing import NamedTuple

import torch
from torch import Tensor

from vcore_kernels import _head_ops  # noqa: F401  (declares the operators)
from vcore_kernels._head import HeadOptions, HeadRows, head_rows, to_labels
from vcore_kernels.backends import reference, resolve


class Second(NamedTuple):
    """Tangents or perturbed values; None where there is none. ``suffix`` names them in errors."""

    suffix: str
    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None


def two_points(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    second: Second,
    options: HeadOptions,
    shift: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor]:
    """Checks, flattens, calls ``op`` of the backend without a graph, and lays out its results."""
    rows = head_rows(op, hidden, weight, target, bias, options, shift, debug)
    d_hidden, d_weight, d_bias = beside = second_rows(op, rows, hidden, weight, bias, second)
    if resolve(op, backend, *rows.tensors(), *(t for t in beside if t is not None)) == "reference":
        call, raw = getattr(reference, op), (options.softcap, options.scale, options.ignore_index)
    else:
        call, raw = getattr(torch.ops.vcore_kernels, op), options.raw()
    with torch.no_grad():
        nll, other = call(
            rows.hidden, rows.weight, rows.target, d_hidden, d_weight, rows.bias, d_bias, *raw
        )
    return to_labels(nll, target.shape, shift), to_labels(other, target.shape, shift)


def second_rows(
    op: str,
    rows: HeadRows,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    second: Second,
) -> list[Tensor | None]:
    """The second values in the shapes and dtypes of ``rows``, checked: hidden, weight, bias."""
    if second.bias is not None and bias is None:
        raise ValueError(f"{op}: bias_{second.suffix} was given without bias. Pass bias as well.")
    beside: list[Tensor | None] = []
    for name, value, given, like in (
        ("hidden", second.hidden, hidden, rows.hidden),
        ("weight", second.weight, weight, rows.weight),
        ("bias", second.bias, bias, rows.bias),
    ):
        if value is None or given is None or like is None:
            beside.append(None)
            continue
        if value.shape != given.shape:
            raise ValueError(
                f"{op}: {name}_{second.suffix} has shape {list(value.shape)}, {name} "
                f"{list(given.shape)}. They must be the same."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"{op}: {name}_{second.suffix} must be floating point, got {value.dtype}."
            )
        beside.append(value.reshape(like.shape).to(like.dtype))
    return beside
