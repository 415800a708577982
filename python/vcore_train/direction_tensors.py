"""Arithmetic on directions: fp32 tensors by parameter name (float64 for float64 parameters)."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vcore_kernels.perturbed import NonFiniteDirectionError

Direction = dict[str, Tensor]


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that a direction has for ``tensor``."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all ``tensors`` together, in fp32 or wider; one synchronisation."""
    norms = [torch.linalg.vector_norm(t, dtype=wide(t)) for t in tensors]
    return float(torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).norm())


def clip_direction(direction: Direction, max_norm: float | None) -> Direction:
    """``direction``, scaled in place to the Euclidean norm ``max_norm`` where it is longer."""
    if max_norm is not None:
        norm = norm_of(direction.values())
        if math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_(list(direction.values()), max_norm / norm)
    return direction


def check_finite(direction: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude in each tensor of ``direction``; one synchronisation.

    Raises NonFiniteDirectionError where it holds NaN or infinity, with the count.
    """
    largest = [
        torch.linalg.vector_norm(g, math.inf) if g.numel() else g.new_zeros(())
        for g in direction.values()
    ]
    values = torch.stack([v.to(largest[0].device, torch.float64) for v in largest]).tolist()
    if all(map(math.isfinite, values)):
        return dict(zip(direction, values, strict=True))
    counts = {name: int((~g.isfinite()).sum()) for name, g in direction.items()}
    bad = [f"{name} ({count})" for name, count in counts.items() if count]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise NonFiniteDirectionError(
        f"{sum(counts.values())} entries of the direction are NaN or infinite, in "
        f"{', '.join(bad[:5])}{more}. The loss it was made from was not finite: lower the "
        "learning rate, or train in bf16 rather than fp16."
    )
