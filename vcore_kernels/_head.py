"""What the four operators on a language-model head share: argument checks, layout, autocast."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vcore_kernels.backends.reference import WITH_AUTOCAST


@dataclass(frozen=True)
class HeadOptions:
    """How logits come from ``hidden @ weight.T + bias``: times ``scale``, then soft-capped."""

    softcap: float | None = None
    scale: float = 1.0
    ignore_index: int = -100

    def __post_init__(self):
        # Comparisons rather than math.isfinite, which torch.compile does not trace.
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap}")
        if not -math.inf < self.scale < math.inf:
            raise ValueError(f"scale must be finite, got {self.scale}")

    def raw(self) -> tuple[float, float, int]:
        """As the operators take them, after the tensors: no soft cap is 0."""
        return self.softcap or 0.0, float(self.scale), self.ignore_index


class HeadRows(NamedTuple):
    """The call as N independent rows: row n of ``hidden`` predicts ``target[n]``."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [N]
    bias: Tensor | None  # [V]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]


def autocast_to(tensor: Tensor, device_type: str) -> Tensor:
    """``tensor`` in the dtype that autocast gives a linear layer; unchanged outside autocast."""
    if tensor.dtype == torch.float64:
        return tensor
    if device_type in WITH_AUTOCAST and torch.is_autocast_enabled(device_type):
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def head_rows(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    shift: int,
    debug: bool,
    vocabulary: int | Tensor | None = None,
) -> HeadRows:
    """Checks shapes and dtypes, flattens to rows, moves the targets of ``shift=1`` to theirs.

    ``vocabulary``: rows of the whole head where ``weight`` is a shard of it, which may be empty.
    """
    if hidden.dim() < 2 or weight.dim() != 2:
        raise ValueError(
            f"{op}: expected hidden [..., H] (2-D or more) and weight [V, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}."
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: weight has {weight.shape[1]} columns, hidden has {hidden.shape[-1]}. "
            "Pass lm_head.weight as [V, H]."
        )
    if weight.shape[0] == 0 and vocabulary is None:
        raise ValueError(f"{op}: weight has no rows (an empty vocabulary).")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: target has shape {list(target.shape)}, hidden {list(hidden.shape)}. "
            "Pass one target for each row of hidden."
        )
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {target.dtype}.")
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise TypeError(f"{op}: expected floating point, got {hidden.dtype} and {weight.dtype}.")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"{op}: bias must be floating point, got {bias.dtype}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: bias has shape {list(bias.shape)}, expected [{weight.shape[0]}], one entry a "
            "row of weight."
        )
    if shift not in (0, 1):
        raise ValueError(f"{op}: shift must be 0 or 1, got {shift}.")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, hidden on {hidden.device}.")

    if vocabulary is None:
        vocabulary = weight.shape[0]
    check_targets(op, target, vocabulary, options.ignore_index, debug)
    device_type = hidden.device.type
    hidden, weight = autocast_to(hidden, device_type), autocast_to(weight, device_type)
    bias = None if bias is None else autocast_to(bias, device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{op}: hidden is {hidden.dtype}, weight is {weight.dtype}. Cast one of them, or run "
            "under torch.autocast."
        )
    target = to_rows(target, shift, fill=options.ignore_index)
    return HeadRows(hidden.flatten(0, -2), weight, target, bias)


def check_targets(
    op: str, target: Tensor, vocabulary: int | Tensor, ignore_index: int, debug: bool
) -> None:
    """Raises ValueError for a target outside the vocabulary.

    On an accelerator the check is asynchronous, so as not to wait for the device, and the error
    surfaces as a device-side assertion; ``debug=True`` waits and raises here.
    """
    if torch.compiler.is_compiling() or target.numel() == 0:
        return
    valid = (target == ignore_index) | ((target >= 0) & (target < vocabulary))
    if target.device.type != "cpu" and not debug:
        torch._assert_async(valid.all())
        return
    if not valid.all():
        row = int((~valid).flatten().nonzero()[0])
        raise ValueError(
            f"{op}: target {int(target.flatten()[row])} at flat position {row} is outside the "
            f"vocabulary of {int(vocabulary)} and is not ignore_index={ignore_index}."
        )


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on a gradient or tangent, whose own derivative raises.

    The raw operators record no graph, so without this a second derivative would miss their part
    without a word. ``inputs`` are what the gradient depends on.
    """

    @staticmethod
    def forward(gradient, message, *inputs):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(ctx.message)


def without_second_derivative(
    op: str,
    gradient: Tensor | None,
    *inputs: Tensor | None,
    mend: str = "Pass backend='reference'.",
):
    """``gradient`` as it is, but raising where someone differentiates it again."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    message = f"{op}: second derivatives are not implemented by this backend. {mend}"
    return _NoSecondDerivative.apply(gradient, message, *inputs)


def vmap_error(op: str) -> RuntimeError:
    return RuntimeError(f"{op}: no vmap rule in this backend. Pass backend='reference'.")


def to_labels(rows: Tensor, shape: torch.Size, shift: int) -> Tensor:
    """Per-row results [N] in the layout of the labels: moved one place right for ``shift=1``."""
    rows = rows.reshape(shape)
    return F.pad(rows[..., :-1], (1, 0)) if shift and shape[-1] else rows


def to_rows(values: Tensor, shift: int, fill: float = 0) -> Tensor:
    """Per-label values in row order [N]; the inverse of :func:`to_labels`."""
    if shift and values.shape[-1]:
        values = F.pad(values[..., 1:], (0, 1), value=fill)
    return values.flatten()
