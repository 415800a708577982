"""Arithmetic on directions: fp32 tensors by parameter name (float64 for float64 parameters).

Of a sharded model they are DTensors, sharded as the parameters are. Every rank then comes to the
same norms, by one collective for all tensors together.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from vcore_kernels.perturbed import NonFiniteDirectionError

Direction = dict[str, Tensor]


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype that a direction has for ``tensor``."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def local(tensor: Tensor) -> Tensor:
    """What of ``tensor`` is here: the shard of a DTensor, in its own storage."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()  # type: ignore[attr-defined]
    return tensor


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all ``tensors`` together, in fp32 or wider; one synchronisation."""
    tensors = list(tensors)
    norms = [torch.linalg.vector_norm(local(t), dtype=wide(t)) for t in tensors]
    squares = torch.stack([n.to(norms[0].device, torch.float64) for n in norms]).square()
    return float(_over_shards(squares, tensors, dist.ReduceOp.SUM).sum().sqrt())


def _over_shards(values: Tensor, tensors: Sequence[Tensor], op: dist.ReduceOp.RedOpType) -> Tensor:
    """``values[i]``, a figure of the local shard of ``tensors[i]``, as that of the whole tensor."""
    sharded = [i for i, t in enumerate(tensors) if isinstance(t, DTensor)]
    if not sharded:
        return values
    first: DTensor = tensors[sharded[0]]  # type: ignore[assignment]
    mesh = first.device_mesh
    reduced = values[sharded].to(mesh.device_type)
    for dim, placement in enumerate(first.placements):
        if placement.is_shard():
            dist.all_reduce(reduced, op, group=mesh.get_group(dim))
    values[sharded] = reduced.to(values.device)
    return values


def clip_direction(direction: Direction, max_norm: float | None) -> Direction:
    """``direction``, scaled in place to the Euclidean norm ``max_norm`` where it is longer."""
    if max_norm is not None:
        norm = norm_of(direction.values())
        if math.isfinite(norm) and norm > max_norm:
            torch._foreach_mul_([local(g) for g in direction.values()], max_norm / norm)
    return direction


def check_finite(direction: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude in each tensor of ``direction``; one synchronisation.

    Raises NonFiniteDirectionError where it holds NaN or infinity, with the count.
    """
    tensors = list(direction.values())
    largest = [
        torch.linalg.vector_norm(local(g), math.inf) if local(g).numel() else g.new_zeros(())
        for g in tensors
    ]
    stacked = torch.stack([local(v).to(local(tensors[0]).device, torch.float64) for v in largest])
    # The maximum of a NaN and a number is a matter of the communication library.
    stacked = stacked.nan_to_num(nan=math.inf, posinf=math.inf)
    values = _over_shards(stacked, tensors, dist.ReduceOp.MAX).tolist()
    if all(map(math.isfinite, values)):
        return dict(zip(direction, values, strict=True))
    bad_here = torch.stack([(~local(g).isfinite()).sum().to(stacked.device) for g in tensors])
    counts = _over_shards(bad_here, tensors, dist.ReduceOp.SUM).tolist()
    bad = [f"{name} ({count})" for name, count in zip(direction, counts, strict=True) if count]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise NonFiniteDirectionError(
        f"{sum(counts)} entries of the direction are NaN or infinite, in "
        f"{', '.join(bad[:5])}{more}. The loss it was made from was not finite: lower the "
        "learning rate, or train in bf16 rather than fp16."
    )
