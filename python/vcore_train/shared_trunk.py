"""Passes that differ in late parameters alone share the layers before the first of these."""

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vcore_train.modeling import decoder_layers, decoder_of

logger = logging.getLogger("vcore_train")
Result = TypeVar("Result")


class SharedTrunk:
    """Runs the decoder layers before the first that reads one of ``moved`` once for many passes.

    Passes go through :meth:`run`, all over one batch. The first runs in full; it keeps what came
    out of the last layer before the first that reads a moved parameter (one hidden state, [B, T,
    H]). In the others every earlier layer gives just that, without computing anything, so that the
    numbers are the same bit for bit; embeddings, masks and rotary tables are made anew.

    Every pass runs in full where a parameter is read before the layers (embeddings), where the
    model has no list of layers, or where the first layer gets something else than hidden states
    from those before it (keys of another layer, say).
    """

    def __init__(self, model: nn.Module, moved: Iterable[nn.Parameter]):
        moved = set(moved)
        self._layers: list[nn.Module] = []
        self._kept: Any = None
        self._arguments: list[Tensor] = []
        self._versions: list[int] = []
        self._complete = False
        try:
            layers = list(decoder_layers(model))
        except ValueError:
            return
        readers = [n for n, layer in enumerate(layers) if not moved.isdisjoint(layer.parameters())]
        self._layers = layers[: readers[0] if readers else len(layers)]
        self._next = layers[readers[0]] if readers else None
        inside = {p for layer in layers for p in layer.parameters()}
        # Modules that hold the other moved parameters themselves; the head is not in the decoder.
        self._outside = [
            module
            for module in decoder_of(model).modules()
            if any(p in moved and p not in inside for p in module.parameters(recurse=False))
        ]

    def run(self, decode: Callable[[], Result]) -> Result:
        """``decode()``, a pass through the decoder; all but the first without the shared layers."""
        if not (self._complete and self._layers):
            return self._first(decode)
        if [t._version for t in _tensors(self._kept)] == self._versions:
            try:
                return self._later(decode)
            except _NotSharedError:
                pass
        logger.info("the layers of this model cannot be shared between passes")
        self._layers, self._kept = [], None
        return decode()

    def _first(self, decode: Callable[[], Result]) -> Result:
        if not self._layers:
            return decode()

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            self._kept, self._versions = out, [t._version for t in _tensors(out)]

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._arguments = _tensors((args, kwargs))

        def read(module: nn.Module, args: Any) -> None:
            early.append(self._kept is None)

        early: list[bool] = []
        with ExitStack() as stack:
            # Ahead of other hooks, which run in every pass.
            stack.callback(self._layers[-1].register_forward_hook(keep, prepend=True).remove)
            for module in self._outside:
                stack.callback(module.register_forward_pre_hook(read).remove)
            if self._next is not None:
                hook = self._next.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            out = decode()
        self._complete = True
        if any(early) or self._kept is None:
            self._layers, self._kept = [], None
        return out

    def _later(self, decode: Callable[[], Result]) -> Result:
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(_restore_forward, layer, layer.__dict__.get("forward"))
                layer.forward = self._give  # type: ignore[method-assign]
            if self._next is not None:
                hook = self._next.register_forward_pre_hook(self._check, with_kwargs=True)
                stack.callback(hook.remove)
            return decode()

    def _give(self, *args: Any, **kwargs: Any) -> Any:
        return self._kept

    def _check(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = _tensors((args, kwargs))
        same = len(given) == len(self._arguments) and all(
            a is b or torch.equal(a, b) for a, b in zip(given, self._arguments, strict=True)
        )
        if not same:
            raise _NotSharedError


class _NotSharedError(Exception):
    """The first layer after the shared ones got something else than in the full pass."""


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _restore_forward(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward  # type: ignore[method-assign]
