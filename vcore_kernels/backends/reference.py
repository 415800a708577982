"""Eager PyTorch for every operator: any dtype, any device, differentiable in both modes.

It stores the logits. Everything else in this library is tested against it in float64.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

# Device types that have autocast; asked here, since torch.compile of PyTorch 2.10 cannot trace it.
_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "privateuseone")
WITH_AUTOCAST = frozenset(filter(torch.amp.is_autocast_available, _DEVICE_TYPES))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, utilities and weights: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_logits(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
    scale: float,
) -> Tensor:  # [N, V]
    acc = statistics_dtype(hidden.dtype)
    bias = None if bias is None else bias.to(acc)
    with without_autocast(hidden.device.type):
        logits = F.linear(hidden.to(acc), weight.to(acc), bias) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast would round the products back to 16 bits."""
    if device_type not in WITH_AUTOCAST:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def nll_of_logits(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy that keeps its relative accuracy when the target's probability is near 1.

    With a = logsumexp over the *other* classes minus the target's logit, nll = softplus(a): the
    textbook ``logsumexp - logit`` cancels to rounding noise there.
    """
    valid = target != ignore_index
    index = target.where(valid, 0).unsqueeze(-1)  # [N, 1]
    at_target = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, -torch.inf)
    if logits.shape[-1] == 1:
        return at_target * 0
    gap = others.logsumexp(-1) - at_target
    return torch.logaddexp(gap, torch.zeros_like(gap)).where(valid, 0)


def linear_nll(hidden, weight, target, bias, softcap, scale, ignore_index) -> Tensor:
    logits = head_logits(hidden, weight, bias, softcap, scale)
    return nll_of_logits(logits, target, ignore_index)


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
    """PyTorch's own forward-mode derivative of :func:`linear_nll`."""
    acc = statistics_dtype(hidden.dtype)

    def dual(primal, tangent):
        if primal is None or tangent is None:
            return primal
        primal = primal.to(acc).contiguous()  # no dual tensor has entries that share memory
        return fwAD.make_dual(primal, tangent.to(acc))

    with fwAD.dual_level():
        nll, tangent = fwAD.unpack_dual(
            linear_nll(
                dual(hidden, hidden_tangent),
                dual(weight, weight_tangent),
                target,
                dual(bias, bias_tangent),
                softcap,
                scale,
                ignore_index,
            )
        )
    return nll, torch.zeros_like(nll) if tangent is None else tangent


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
    """Base loss, and base minus perturbed loss by plain subtraction."""
    acc = statistics_dtype(hidden.dtype)
    args = (target, bias if bias is None else bias.to(acc), softcap, scale, ignore_index)
    nll = linear_nll(hidden.to(acc), weight.to(acc), *args)
    weight_perturbed = weight if weight_perturbed is None else weight_perturbed
    if bias_perturbed is not None:
        args = (target, bias_perturbed.to(acc), *args[2:])
    perturbed = linear_nll(hidden_perturbed.to(acc), weight_perturbed.to(acc), *args)
    return nll, nll - perturbed


@torch.no_grad()
def linear_nll_grad_norms(
    hidden, weight, target, bias, offsets, length, softcap, scale, ignore_index
) -> Tensor:
    """[S]: the logits of one sequence at a time, and the gradient in slices of the vocabulary.

    ``softcap`` 0 means none. Waits for the device, which alone knows the segments' bounds.
    """
    acc = statistics_dtype(hidden.dtype)
    wide, softcap = weight.to(acc), softcap or None
    step = max(1, _SLICE // max(1, weight.shape[1]))
    norms = hidden.new_zeros(offsets.shape[0] - 1, dtype=acc)
    with without_autocast(hidden.device.type):
        for i_segment, (begin, end) in enumerate(pairwise(offsets.tolist())):
            labels = target[begin:end]
            supervised = labels != ignore_index
            labels, rows = labels[supervised], hidden[begin:end][supervised].to(acc)
            gradient = _logit_gradients(rows, wide, labels, bias, softcap, scale)
            squares = [(g.T @ rows).square().sum() for g in gradient.split(step, dim=1)]
            norms[i_segment] = torch.stack(squares).sum().sqrt()
    return norms


_SLICE = 1 << 24  # entries of the weight's gradient at a time


def _logit_gradients(rows, weight, target, bias, softcap, scale) -> Tensor:
    """d nll / d (hidden @ weight.T) for supervised rows: [n, V]."""
    logits = head_logits(rows, weight, bias, softcap, scale)
    nll = nll_of_logits(logits, target, -100)
    # 1 - p keeps its relative accuracy where p is close to 1
    at_target = torch.expm1(-nll).unsqueeze(1)
    gradient = logits.softmax(1).scatter(1, target.unsqueeze(1), at_target) * scale
    return gradient if softcap is None else gradient * (1 - (logits / softcap) ** 2)
