"""Utilities in float64 by reverse-mode derivatives of the model's own logits: the truth."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vcore_train.modeling import probing, supervised_labels


class LiftedCasts(TorchFunctionMode):
    """Casts to float32 go to float64: transformers hard-codes some in norms, softmax and rotary."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def lift(value):
            return torch.float64 if value is torch.float32 else value

        args, kwargs = torch.utils._pytree.tree_map(lift, (args, kwargs or {}))
        return torch.Tensor.double(*args) if func is torch.Tensor.float else func(*args, **kwargs)


def double_copy(model: nn.Module) -> Any:
    """``model`` in float64, its parameters at their present (rounded) values."""
    return copy.deepcopy(model).double()


def exact_nll(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Losses [B, T] of a float64 model, without dropout, from its own logits."""
    labels = supervised_labels(inputs)
    inputs = {k: v for k, v in inputs.items() if k != "labels"}
    with LiftedCasts(), probing(model):
        logits = model(**inputs, use_cache=False).logits  # with a cache, packing is not seen
        nll = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
    return F.pad(nll.view(labels.shape[0], -1), (1, 0))


def exact_utilities(
    model: nn.Module, inputs: Mapping[str, Any], direction: Mapping[str, Tensor]
) -> Tensor:
    """``<g, grad l_t>`` [B, T], float64: the derivative in v of ``<g, grad sum_t v_t l_t>``.

    Takes a float64 copy of the model, and about four times the time and memory of a training pass
    in float64.
    """
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
    product = torch.stack(
        [
            (g * direction[n].double()).sum()
            for n, g in zip(names, grads, strict=True)
            if g is not None
        ]
    ).sum()
    return torch.autograd.grad(product, v)[0]
