"""Layers on dual tensors, with fewer and larger operations than PyTorch's forward mode takes.

Each takes tensors that may carry a tangent (torch.autograd.forward_ad) and returns a dual tensor.
The value keeps its autograd graph where gradients are recorded, exactly as the plain layer's would;
the tangent never has one. A missing tangent costs nothing. Autocast holds as for the plain layer.
"""

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor

from vcore_kernels import gated_jvp, rms_norm_jvp

__all__ = ["gated", "has_tangent", "linear", "low_rank_update", "plain_rms_norm", "rms_norm"]

ACTIVATIONS = {  # of gated_jvp, as plain functions
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and fwAD.unpack_dual(tensor).tangent is not None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, tangent ``dx @ weight.T + x @ dweight.T + dbias``.

    Two products with a frozen weight, three with a moving one. x [..., K], weight [M, K].
    """
    (x, dx), (weight, dweight) = _unpacked(x), _unpacked(weight)
    device = x.device.type
    x, weight = _autocast(x, device), _autocast(weight, device)
    dbias = None
    if bias is not None:
        bias, dbias = _unpacked(bias)
        bias = _autocast(bias, device)
    y = F.linear(x, weight, bias)
    with torch.no_grad():
        dy = None if dx is None else F.linear(dx.to(x.dtype), weight)
        if dweight is not None:
            dy = _plus_product(dy, x, dweight.to(x.dtype))
        if dbias is not None:
            dbias = dbias.to(y.dtype)
            dy = dbias.expand(y.shape).contiguous() if dy is None else dy.add_(dbias)
    return _dual(y, dy)


def low_rank_update(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``y + scaling * (x @ lora_a.T) @ lora_b.T`` as ``dtype``: what LoRA adds to a layer's output.

    Computed as PEFT does, in the adapter's dtype or autocast's. The tangent's terms go through one
    product of rank 2r: ``[du, u] @ [lora_b, dlora_b].T`` with ``u = x @ lora_a.T``.

    Args:
        y: [..., M].
        x: [..., K], lora_a [r, K], lora_b [M, r].
    """
    (y, dy), (x, dx), (a, da), (b, db) = map(_unpacked, (y, x, lora_a, lora_b))
    device = x.device.type
    x = _autocast(x.to(a.dtype), device)
    a, b = _autocast(a, device), _autocast(b, device)
    recording = torch.is_grad_enabled() and any(t.requires_grad for t in (y, x, a, b))
    if recording:
        out = (y + F.linear(F.linear(x, a), b) * scaling).to(dtype)
    with torch.no_grad():
        du = None
        if da is None:
            u = F.linear(x, a)
        else:
            u, du = F.linear(x, torch.cat([a, da.to(a.dtype)])).split(len(a), dim=-1)
        if dx is not None:
            through = F.linear(dx.to(a.dtype), a)
            du = through if du is None else through.add_(du)
        if not recording:
            out = _plus_low_rank(y, u, b, scaling, dtype)
        terms = [] if du is None else [(du, b)]
        if db is not None:
            terms.append((u, db.to(b.dtype)))
        if terms:
            left, right = zip(*terms, strict=True)
            columns = torch.cat(right, dim=1)
            dy = _plus_low_rank(dy, torch.cat(left, dim=-1), columns, scaling, dtype)
    return _dual(out, dy if dy is None else dy.to(dtype))


def plain_rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype
) -> Tensor:
    """``(offset + weight) * x / sqrt(mean(x^2) + eps)`` in float32 or wider, then ``dtype``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.to(wide)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (values * (weight.to(wide) + offset)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    """:func:`plain_rms_norm` of duals; x [..., H], weight [H]."""
    (x, dx), (weight, dweight) = _unpacked(x), _unpacked(weight)
    if dx is None and dweight is None:
        return plain_rms_norm(x, weight, eps, offset, dtype)
    y, dy = rms_norm_jvp(
        x.detach(), weight.detach(), dx, dweight, eps=eps, offset=offset, out_dtype=dtype
    )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        y = plain_rms_norm(x, weight, eps, offset, dtype)
    return _dual(y, dy)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``f(gate) * up``, ``activation`` one of :data:`ACTIVATIONS`."""
    (gate, dgate), (up, dup) = _unpacked(gate), _unpacked(up)
    if dgate is None and dup is None:
        return ACTIVATIONS[activation](gate) * up
    y, dy = gated_jvp(gate.detach(), up.detach(), dgate, dup, activation=activation)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        y = ACTIVATIONS[activation](gate) * up
    return _dual(y, dy)


def _unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = fwAD.unpack_dual(tensor)
    return primal, None if tangent is None else tangent.detach()


def _dual(value: Tensor, tangent: Tensor | None) -> Tensor:
    return value if tangent is None else fwAD.make_dual(value, tangent)


def _autocast(tensor: Tensor, device: str) -> Tensor:
    """As autocast gives it to a linear layer; one cast then serves every product with it."""
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _plus_product(y: Tensor | None, x: Tensor, weight: Tensor) -> Tensor:
    """``y + x @ weight.T``, in the storage of y."""
    if y is None:
        return F.linear(x, weight)
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return y


def _plus_low_rank(
    y: Tensor | None, u: Tensor, b: Tensor, scaling: float, dtype: torch.dtype
) -> Tensor:
    """``y + scaling * u @ b.T``, y untouched."""
    if y is None:
        return F.linear(u * scaling, b).to(dtype)
    if y.dtype != u.dtype:
        return F.linear(u * scaling, b).add_(y).to(dtype)
    rows = torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), b.t(), alpha=scaling)
    return rows.view(y.shape).to(dtype)
