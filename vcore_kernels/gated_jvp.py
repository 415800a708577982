"""The gated product of SwiGLU and GeGLU with its forward-mode derivative, in one sweep."""

from collections.abc import Callable

import torch
from torch import Tensor

from vcore_kernels._library import define, no_derivative
from vcore_kernels.backends import reference_rows, resolve
from vcore_kernels.spans import spanned


def _fake(gate, up, *_):
    return torch.empty_like(gate), torch.empty_like(gate)


define(
    "gated_jvp(Tensor gate, Tensor up, Tensor? dgate, Tensor? dup, str activation)"
    " -> (Tensor y, Tensor dy)",
    _fake,
)
no_derivative("gated_jvp")

ACTIVATIONS = ("silu", "gelu_tanh")


@spanned
def gated_jvp(
    gate: Tensor,
    up: Tensor,
    dgate: Tensor | None,
    dup: Tensor | None,
    *,
    activation: str,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``f(gate) * up`` and its derivative ``f'(gate) * dgate * up + f(gate) * dup``.

    Computed in float32 (float64 for float64) and rounded once. Four reads and two writes. No
    gradient flows through the result.

    Args:
        gate, up: of one shape and dtype.
        dgate, dup: their tangents; None is zero.
        activation: f. "silu": ``g * sigmoid(g)``; "gelu_tanh": the tanh approximation of GELU.
        backend: "auto", "reference" or "cpp".

    Returns:
        (y, dy), shaped like ``gate``, in its dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that differ, unknown activation.
        BackendError: the named backend cannot serve the call.

    Source: Shazeer, arXiv 2002.05202; Hendrycks and Gimpel, arXiv 1606.08415 (GELU).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_jvp: unknown activation {activation!r}, expected one of "
            f"{', '.join(ACTIVATIONS)}."
        )
    if not gate.is_floating_point():
        raise TypeError(f"gated_jvp: gate must be floating-point, got {gate.dtype}.")
    for name, value in (("up", up), ("dgate", dgate), ("dup", dup)):
        if value is not None and (
            (value.shape, value.dtype, value.device) != (gate.shape, gate.dtype, gate.device)
        ):
            raise ValueError(
                f"gated_jvp: {name} is {value.dtype} {list(value.shape)} on {value.device}, gate "
                f"is {gate.dtype} {list(gate.shape)} on {gate.device}. They must agree."
            )
    call: Callable[..., tuple[Tensor, Tensor]] = torch.ops.vcore_kernels.gated_jvp
    if resolve("gated_jvp", backend, gate) == "reference":
        call = reference_rows.gated_jvp
    with torch.no_grad():
        return call(gate.contiguous(), up, dgate, dup, activation)
