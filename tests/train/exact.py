"""The oracle of the studies, and a second way to the same figures that checks it."""

import torch
from vcore_train.experiments.exact import LiftedCasts, double_copy, exact_nll, exact_utilities

__all__ = [
    "LiftedCasts",
    "double_copy",
    "exact_nll",
    "exact_utilities",
    "exact_utilities_one_by_one",
    "random_direction",
]


def exact_utilities_one_by_one(model, inputs, direction):
    """:func:`exact_utilities` by one backward pass a token."""
    model = double_copy(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    nll = exact_nll(model, inputs)
    out = torch.zeros_like(nll)
    for place in (nll.detach() != 0).nonzero().tolist():
        grads = torch.autograd.grad(
            nll[tuple(place)], [named[n] for n in direction], retain_graph=True, allow_unused=True
        )
        out[tuple(place)] = sum(
            (g * d.double()).sum()
            for g, d in zip(grads, direction.values(), strict=True)
            if g is not None
        )
    return out


def random_direction(parameters, *, seed=0):
    """Random normal tensors shaped like ``parameters``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in parameters.items()
    }
