"""What the uses of a parameter in a pass know of its gradient: inputs, and gradients of outputs.

A linear layer's weight gradient is ``sum_t d_t x_t'``, an embedding's the sum of the rows ``d_t``
of each token. With x and d of every token, all that concerns one sequence can be had from the
backward pass of a whole batch, whose own weight gradients are not formed.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_layers import GradientCheckpointingLayer

from vcore_kernels._head import autocast_to


class LinearUse(NamedTuple):
    """A linear layer in a pass over tokens [..., features]."""

    weight: nn.Parameter | None  # [out, in]; None: not watched
    bias: nn.Parameter | None
    only: bool  # whether the weight has no other use in the pass
    input: Tensor  # [..., in]
    gradient: Tensor  # [..., out] of the output


class LookupUse(NamedTuple):
    """An embedding in a pass over tokens [...]."""

    weight: nn.Parameter  # [V, H]
    tokens: Tensor  # int64 [...]
    gradient: Tensor  # [..., H] of the rows looked up; 0 at the padding index


class ParameterUses(TorchFunctionMode):
    """While entered, tells ``arrived`` of every use of ``watched`` parameters, in backward.

    The uses are calls of ``F.linear`` and ``F.embedding``. Any other function that makes a tensor
    of a watched parameter raises ValueError, so that no part of its gradient gets lost.
    Under autocast the casts are those of a linear layer.

    Leave the context before backward; :meth:`recomputed` sees to checkpointed layers. Backward is
    ``torch.autograd.grad(loss, uses.anchor, allow_unused=True)``: every use is between the loss and
    the anchor, whether or not anything requires a gradient, and no parameter is.
    """

    def __init__(
        self,
        watched: dict[nn.Parameter, str],  # with the names for messages
        arrived: Callable[[LinearUse | LookupUse], None],
    ):
        super().__init__()
        self.watched, self.arrived = watched, arrived
        self.anchor = torch.zeros((), requires_grad=True)
        self.counts = dict.fromkeys(watched, 0)  # uses in the forward pass
        self._recomputing = False

    @contextmanager
    def recomputed(self, model: nn.Module) -> Iterator[None]:
        """Layers of ``model`` that checkpoint are watched in their second forward pass, too."""
        layers: list[Any] = [
            m
            for m in model.modules()
            if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
        ]
        plain = [layer._gradient_checkpointing_func for layer in layers]
        for layer, function in zip(layers, plain, strict=True):
            layer._gradient_checkpointing_func = partial(function, context_fn=self._contexts)
        try:
            yield
        finally:
            for layer, function in zip(layers, plain, strict=True):
                layer._gradient_checkpointing_func = function

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), self._second_pass()

    @contextmanager
    def _second_pass(self) -> Iterator[None]:
        self._recomputing = True
        try:
            with self:
                yield
        finally:
            self._recomputing = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        used = [a for a in _tensors([*args, *kwargs.values()]) if a in self.watched]
        if not used:
            return func(*args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.embedding:
            return self._embedding(func, args, kwargs)
        out = func(*args, **kwargs)
        if _tensors([out]):
            raise self._unsupported(used[0], getattr(func, "__name__", str(func)))
        return out  # a dtype, a shape, a device

    def _linear(self, input: Tensor, weight: Any, bias: Any = None) -> Tensor:
        watched = [p if p in self.watched else None for p in (weight, bias)]
        if input in self.watched:
            raise self._unsupported(input, "linear, as its input")
        self._count(watched)
        device = input.device.type
        operands = (None if p is None else autocast_to(p.detach(), device) for p in (weight, bias))
        anchor = self.anchor.to(input.device)
        return _Linear.apply(autocast_to(input, device), *operands, anchor, self, watched)

    def _embedding(self, func, args, kwargs) -> Tensor:
        call = _EMBEDDING.bind(*args, **kwargs)
        call.apply_defaults()
        weight, padding = call.arguments["weight"], call.arguments["padding_idx"]
        if call.arguments["max_norm"] is not None or call.arguments["scale_grad_by_freq"]:
            raise self._unsupported(weight, "embedding with max_norm or scale_grad_by_freq")
        self._count([weight])
        tokens, anchor = call.arguments["input"], self.anchor.to(weight.device)
        call.arguments["weight"] = weight.detach()
        look_up = partial(func, *call.args, **call.kwargs)
        padding = None if padding is None else padding % weight.shape[0]
        return _Lookup.apply(look_up, tokens, padding, anchor, self, weight)

    def _count(self, parameters: Sequence[nn.Parameter | None]) -> None:
        if not torch.is_grad_enabled():
            used = next(p for p in parameters if p is not None)
            raise self._unsupported(used, "a function that hides its graph")
        for parameter in parameters:
            if parameter is not None and not self._recomputing:
                self.counts[parameter] += 1

    def _unsupported(self, parameter: Tensor, what: str) -> ValueError:
        name = self.watched[parameter]  # type: ignore[index]
        return ValueError(
            f"sequence_grad_norms: {name} {list(parameter.shape)} is used by {what}. Only weights "
            "and biases of linear layers and weights of embeddings are supported: leave it out of "
            "params."
        )


_EMBEDDING = inspect.signature(F.embedding)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors in ``values`` and in lists and tuples that they are."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class _Linear(torch.autograd.Function):
    """F.linear whose backward tells of inputs and gradients, and forms only that of the input."""

    @staticmethod
    def forward(ctx, input, weight, bias, anchor, uses, watched):
        ctx.save_for_backward(input, weight)
        ctx.uses, ctx.watched = uses, watched
        return F.linear(input, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        input, weight = ctx.saved_tensors
        of_weight, of_bias = ctx.watched
        only = ctx.uses.counts.get(of_weight) == 1
        ctx.uses.arrived(LinearUse(of_weight, of_bias, only, input, gradient))
        back = gradient @ weight if ctx.needs_input_grad[0] else None
        return back, None, None, None, None, None


class _Lookup(torch.autograd.Function):
    """F.embedding whose backward tells of the gradients of its rows."""

    @staticmethod
    def forward(ctx, look_up, tokens, padding, anchor, uses, weight):
        ctx.save_for_backward(tokens)
        ctx.padding, ctx.uses, ctx.weight = padding, uses, weight
        return look_up()

    @staticmethod
    def backward(ctx, gradient):
        (tokens,) = ctx.saved_tensors
        if ctx.padding is not None:
            gradient = gradient.masked_fill((tokens == ctx.padding).unsqueeze(-1), 0)
        ctx.uses.arrived(LookupUse(ctx.weight, tokens, gradient))
        return None, None, None, None, None, None
