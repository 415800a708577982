"""Utilities in float64 by reverse-mode derivatives of the model's own logits: the truth."""

import copy

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from vcore_train.modeling import probing, supervised_labels


class LiftedCasts(TorchFunctionMode):
    """Casts to float32 go to float64: transformers hard-codes some in norms, softmax and rotary."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def lift(value):
            return torch.float64 if value is torch.float32 else value

        args, kwargs = torch.utils._pytree.tree_map(lift, (args, kwargs or {}))
        return torch.Tensor.double(*args) if func is torch.Tensor.float else func(*args, **kwargs)


def double_copy(model):
    """``model`` in float64, its parameters at their present (rounded) values."""
    return copy.deepcopy(model).double()


def exact_nll(model, inputs):
    """Losses [B, T] of a float64 model, without dropout, from its own logits."""
    labels = supervised_labels(inputs)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    with LiftedCasts(), probing(model):
        logits = model(**inputs, use_cache=False).logits  # with a cache, packing is not seen
        nll = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
    return F.pad(nll.view(labels.shape[0], -1), (1, 0))


def exact_utilities(model, inputs, direction):
    """``<g, grad l_t>`` [B, T] for every t: the derivative in v of ``<g, grad sum_t v_t l_t>``."""
    model = double_copy(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    model.requires_grad_(False)
    for name in direction:
        named[name].requires_grad_()
    nll = exact_nll(model, inputs)
    v = torch.zeros_like(nll, requires_grad=True)
    names = list(direction)
    grads = torch.autograd.grad(
        (v * nll).sum(), [named[n] for n in names], create_graph=True, allow_unused=True
    )
    product = sum(
        (g * direction[n].double()).sum()
        for n, g in zip(names, grads, strict=True)
        if g is not None
    )
    return torch.autograd.grad(product, v)[0]


def exact_utilities_one_by_one(model, inputs, direction):
    """The same by one backward pass a token."""
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
