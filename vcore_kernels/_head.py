"""What the four operators on a language-model head share: argument checks, layout, autocast."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class HeadOptions:
    """How logits come from ``hidden @ weight.T + bias``: times ``scale``, then soft-capped."""

    softcap: float | None = None
    scale: float = 1.0
    ignore_index: int = -100

    def __post_init__(self):
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap must be a positive number or None, got {self.softcap}")
        if not math.isfinite(self.scale):
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
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
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
) -> HeadRows:
    """Checks shapes and dtypes, flattens to rows, moves the targets of ``shift=1`` to theirs."""
    if hidden.dim() < 2 or weight.dim() != 2:
        raise ValueError(
            f"{op}: expected hidden [..., H] and weight [V, H], got {list(hidden.shape)} and "
            f"{list(weight.shape)}."
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: weight has {weight.shape[1]} columns, hidden has {hidden.shape[-1]}. "
            "Pass lm_head.weight as [V, H]."
        )
    if weight.shape[0] == 0:
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

    check_targets(op, target, weight.shape[0], options.ignore_index, debug)
    device_type = hidden.device.type
    hidden, weight = autocast_to(hidden, device_type), autocast_to(weight, device_type)
    bias = None if bias is None else autocast_to(bias, device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{op}: hidden is {hidden.dtype}, weight is {weight.dtype}. Cast one of them, or run "
            "under torch.autocast."
        )
    if shift:
        target = F.pad(target[..., 1:], (0, 1), value=options.ignore_index)
    return HeadRows(hidden.flatten(0, -2), weight, target.flatten(), bias)


def check_targets(op: str, target: Tensor, vocabulary: int, ignore_index: int, debug: bool) -> None:
    """Raises ValueError for a target outside the vocabulary.

    On an accelerator the check is asynchronous, so as not to wait for the device, and the error
    surfaces as a device-side assertion; ``debug=True`` waits and raises here.
    """
    if target.numel() == 0 or torch.compiler.is_compiling():
        return
    valid = (target == ignore_index) | ((target >= 0) & (target < vocabulary))
    if target.device.type != "cpu" and not debug:
        torch._assert_async(valid.all())
        return
    if not valid.all():
        row = int((~valid).flatten().nonzero()[0])
        raise ValueError(
            f"{op}: target {int(target.flatten()[row])} at flat position {row} is outside the "
            f"vocabulary of {vocabulary} and is not ignore_index={ignore_index}."
        )


def rows_like(op: str, name: str, value: Tensor, like: Tensor) -> Tensor:
    """``value``, a tangent or perturbed copy of an input, in the layout and dtype of ``like``."""
    if value.numel() != like.numel() or value.shape[-1:] != like.shape[-1:]:
        raise ValueError(
            f"{op}: {name} has shape {list(value.shape)}, which does not match {list(like.shape)}."
        )
    if not value.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}.")
    return value.reshape(like.shape).to(like.dtype)


def refuse_second_derivatives(op: str) -> None:
    """For the backward of a function whose gradients carry no graph: raises under
    create_graph=True.

    PyTorch would drop the missing part without a word where other paths reach the same input.
    torch.func.grad always asks for a graph, so there nothing can be told apart.
    """
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{op}: second derivatives (create_graph=True) are not implemented by this backend. "
            "Pass backend='reference'."
        )


def to_labels(rows: Tensor, shape: torch.Size, shift: int) -> Tensor:
    """Per-row results [N] in the layout of the labels: moved one place right for ``shift=1``."""
    rows = rows.reshape(shape)
    return F.pad(rows[..., :-1], (1, 0)) if shift else rows


def to_rows(values: Tensor, shift: int) -> Tensor:
    """Per-label values in row order [N]; the inverse of :func:`to_labels`."""
    return (F.pad(values[..., 1:], (0, 1)) if shift else values).flatten()
