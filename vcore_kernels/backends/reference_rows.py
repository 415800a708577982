"""Row-wise layers with a tangent in eager PyTorch: any dtype, any device."""

import math

import torch
from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype


def rms_norm_jvp(
    x: Tensor,  # [N, H]
    weight: Tensor,  # [H], in the dtype of the statistics
    dx: Tensor | None,
    dweight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    wide = statistics_dtype(x.dtype)
    x = x.to(wide)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * scale
    dy = torch.zeros_like(x)
    if dx is not None:
        dx = dx.to(wide)
        dy = (dx - normed * (normed * dx).mean(-1, keepdim=True)) * (scale * weight)
    if dweight is not None:
        dy = dy + normed * dweight
    return (normed * weight).to(out_dtype), dy.to(out_dtype)


def gated_jvp(
    gate: Tensor,  # [N, F]
    up: Tensor,
    dgate: Tensor | None,
    dup: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    g, u = (x.to(statistics_dtype(gate.dtype)) for x in (gate, up))
    if activation == "silu":
        sigmoid = torch.sigmoid(g)
        value, slope = g * sigmoid, sigmoid * (1 + g * (1 - sigmoid))
    else:
        root = math.sqrt(2 / math.pi)
        tanh = torch.tanh(root * (g + 0.044715 * g**3))
        value = 0.5 * g * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh**2) * root * (1 + 3 * 0.044715 * g**2)
    dy = torch.zeros_like(g)
    if dgate is not None:
        dy = slope * dgate.to(g.dtype) * u
    if dup is not None:
        dy = dy + value * dup.to(g.dtype)
    return (value * u).to(gate.dtype), dy.to(gate.dtype)
