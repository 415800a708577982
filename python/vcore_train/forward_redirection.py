"""Runs code inside the forward pass of a wrapped module."""

from collections.abc import Callable
from typing import Any

from torch import nn


def call_inside_forward(wrapper: nn.Module, module: nn.Module, function: Callable[[], Any]) -> Any:
    """``function()`` within the forward of ``wrapper`` (DDP, for instance) around ``module``.

    Wrappers prepare the backward pass around the forward of the module that they wrap, so a loss
    computed beside it would leave gradients without synchronisation. Where nothing is wrapped it is
    a plain call.
    """
    if wrapper is module:
        return function()
    own = vars(module).get("forward")

    def redirected() -> Any:
        restore()
        return function()

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    module.forward = redirected
    try:
        return wrapper()
    finally:
        restore()
