"""Root-mean-square normalisation and its forward-mode derivative, in one sweep over the rows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vcore_kernels._library import define, no_derivative
from vcore_kernels.backends import reference_rows, resolve
from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.spans import spanned


def _fake(x, weight, dx, dweight, eps, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.shape, dtype=out_dtype)


define(
    "rms_norm_jvp(Tensor x, Tensor weight, Tensor? dx, Tensor? dweight, float eps,"
    " ScalarType out_dtype) -> (Tensor y, Tensor dy)",
    _fake,
)
no_derivative("rms_norm_jvp")


@spanned
def rms_norm_jvp(
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dweight: Tensor | None = None,
    *,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``(offset + weight) * n`` with ``n = x / sqrt(mean(x^2) + eps)``, and its derivative.

    The tangent is ``(offset + weight) * (dx - n * mean(n * dx)) / sqrt(mean(x^2) + eps) + dweight *
    n``. All of it is computed in float32 (float64 for float64) and rounded once. Two reads and two
    writes of [N, H]. No gradient flows through the result.

    Args:
        x: [..., H].
        weight: [H].
        dx, dweight: tangents shaped like x and weight; None is zero.
        eps: added to the mean square, >= 0.
        offset: 1.0 for Gemma's ``1 + weight``.
        out_dtype: of both results; None: x's.
        backend: "auto", "reference" or "cpp".

    Returns:
        (y, dy), shaped like x.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or eps that do not fit.
        BackendError: the named backend cannot serve the call.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    _check(x, weight, dx, dweight, eps)
    wide = statistics_dtype(x.dtype)
    rows = [None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, dx)]
    scales = [weight.to(wide) + offset, None if dweight is None else dweight.to(wide)]
    call: Callable[..., tuple[Tensor, Tensor]] = torch.ops.vcore_kernels.rms_norm_jvp
    if resolve("rms_norm_jvp", backend, x) == "reference":
        call = reference_rows.rms_norm_jvp
    with torch.no_grad():
        y, dy = call(rows[0], scales[0], rows[1], scales[1], float(eps), out_dtype or x.dtype)
    return y.view(x.shape), dy.view(x.shape)


def _check(x, weight, dx, dweight, eps) -> None:
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm_jvp: weight is {list(weight.shape)}, x {list(x.shape)}. Pass the weight as "
            "[H], H the last dimension of x."
        )
    tangents = (("x", x, dx), ("weight", weight, dweight))
    for name, value, tangent in tangents:
        if not value.is_floating_point() or value.device != x.device:
            raise TypeError(
                f"rms_norm_jvp: {name} is {value.dtype} on {value.device}; expected a "
                f"floating-point tensor on x's device, {x.device}."
            )
        if tangent is not None and (
            tangent.shape != value.shape
            or tangent.device != x.device
            or not tangent.is_floating_point()
        ):
            raise ValueError(
                f"rms_norm_jvp: d{name} is {tangent.dtype} {list(tangent.shape)} on "
                f"{tangent.device}, {name} is {value.dtype} {list(value.shape)} on {value.device}. "
                f"Pass a tangent like {name}, or None."
            )
    if not 0 <= eps < math.inf:
        raise ValueError(f"rms_norm_jvp: eps must be finite and not negative, got {eps}.")
