"""In-place perturbation in eager PyTorch: any device, the same bits as the compiled kernel.

Tensors come dense, a direction in the strides of its parameter; everything happens in memory order.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vcore_kernels.backends.reference import statistics_dtype

_LOW = 0xFFFFFFFF
# The integers as wide as the entries.
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view of a dense tensor's storage; writing to it counts in the tensor's version."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def perturb_(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    saved: Sequence[Tensor],
    epsilon: float,
    seed: int | None,
    counts: Tensor,
) -> None:
    """theta <- round(theta - epsilon * g), the old bits into ``saved``.

    ``saved`` are uint8 buffers, or ``direction`` itself. Row t of ``counts`` is written when the
    old bits of tensor t are safe and before it moves.
    """
    for number, tensors in enumerate(zip(params, direction, saved, strict=True)):
        theta, g, keep = map(in_memory_order, tensors)
        _perturb_one(theta, g, keep, epsilon, seed, number, counts)


def _perturb_one(
    theta: Tensor,
    g: Tensor,
    keep: Tensor,
    epsilon: float,
    seed: int | None,
    number: int,
    counts: Tensor,
) -> None:
    acc = statistics_dtype(theta.dtype)
    if seed is not None and theta.dtype == torch.float32:
        acc = torch.float64
    moved = theta.to(acc) - g.to(acc) * epsilon
    new = moved.to(theta.dtype) if seed is None else _round(moved, theta.dtype, seed, number)
    bits = BITS[theta.dtype]
    changed = (new.view(bits) != theta.view(bits)).sum()
    row = torch.stack([(g != 0).sum(), changed, (~g.isfinite()).any()]).cpu()
    keep.view(torch.uint8)[: theta.nbytes] = theta.view(torch.uint8)
    counts[number] = row
    theta.copy_(new)


def perturb_swap_(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    epsilon: float,
    seed: int | None,
    counts: Tensor,
) -> None:
    """:func:`perturb_` that puts the old bits in the place of the direction."""
    perturb_(params, direction, direction, epsilon, seed, counts)


def restore_(params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Puts back the bits that :func:`perturb_` saved."""
    for theta, keep in zip(params, saved, strict=True):
        flat = in_memory_order(theta).view(torch.uint8)
        flat.copy_(in_memory_order(keep).view(torch.uint8)[: flat.numel()])


def _round(x: Tensor, dtype: torch.dtype, seed: int, tensor: int) -> Tensor:
    """``x`` in ``dtype``, each entry rounded up or down at random, with expectation ``x``."""
    random = _philox(x.numel(), seed, tensor, x.device)
    if dtype == torch.bfloat16:
        bits = x.view(torch.int32) + (random & 0xFFFF).to(torch.int32)
        rounded = (bits >> 16 << 16).view(torch.float32)
    elif dtype == torch.float16:
        bits = x.view(torch.int32) + (random & 0x1FFF).to(torch.int32)
        normal = (bits >> 13 << 13).view(torch.float32)
        subnormal = x.abs() * 2.0**24 + (random >> 8).to(torch.float32) * 2.0**-24
        subnormal = torch.copysign(subnormal.floor() * 2.0**-24, x)
        rounded = torch.where(x.abs() < 2.0**-14, subnormal, normal)
    else:
        bits = x.view(torch.int64) + (random & 0x1FFFFFFF)
        normal = (bits >> 29 << 29).view(torch.float64)
        subnormal = x.abs() * 2.0**149 + random.to(torch.float64) * 2.0**-32
        subnormal = torch.copysign(subnormal.floor() * 2.0**-149, x)
        rounded = torch.where(x.abs() < 2.0**-126, subnormal, normal)
    within = x.abs() <= torch.finfo(torch.float32).max
    return torch.where(within, rounded, x).to(dtype)


def _philox(size: int, seed: int, tensor: int, device: torch.device) -> Tensor:
    """``size`` random 32-bit words as int64, laid out as in csrc/perturb_formats.h."""
    counter = torch.arange((size + 1023) // 1024 * 256, device=device)
    words = [counter & _LOW, counter >> 32, torch.full_like(counter, tensor)]
    words.append(torch.zeros_like(counter))
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        product0, product1 = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57  # modulo 2**64
        words = [
            (product1 >> 32 & _LOW) ^ words[1] ^ keys[0],
            product1 & _LOW,
            (product0 >> 32 & _LOW) ^ words[3] ^ keys[1],
            product0 & _LOW,
        ]
        keys = [keys[0] + 0x9E3779B9 & _LOW, keys[1] + 0xBB67AE85 & _LOW]
    return torch.stack([word.view(-1, 256) for word in words], dim=1).flatten()[:size]
