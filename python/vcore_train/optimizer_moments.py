"""The moments of an optimizer, read as directions: Adam's and its kin's, and SGD's momentum."""

import logging
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vcore_train.direction_tensors import Direction, wide

logger = logging.getLogger("vcore_train")
Parameters = Mapping[str, nn.Parameter]
# Optimizers whose cold start was reported.
_reported: WeakSet[Any] = WeakSet()


@torch.no_grad()
def first_moments(parameters: Parameters, optimizer: Any, kind: str) -> Direction | None:
    """The average of past gradients of each parameter as new tensors; 0 for those without state.

    None while the optimizer has no state for any of them, which is logged once.

    Raises ValueError where ``optimizer`` is None, does not hold the parameters, or keeps its
    moments in a form that cannot be read; ``kind`` names the direction in messages.
    """
    groups = _groups(parameters, optimizer, f"kind {kind!r}")
    states = {name: _state(optimizer, p) for name, p in parameters.items()}
    if not any(states.values()):
        _report_cold_start(optimizer, f"direction {kind!r}", "using a probe gradient")
        return None
    return {
        name: _first_moment(state, groups[p], kind).to(wide(p))
        if (state := states[name])
        else torch.zeros_like(p, dtype=wide(p), requires_grad=False)
        for name, p in parameters.items()
    }


@torch.no_grad()
def preconditioned(direction: Direction, parameters: Parameters, optimizer: Any) -> Direction:
    """``g / (sqrt(v_hat) + eps)`` with Adam's bias-corrected second moment v_hat, as new tensors.

    This is the direction in which Adam would step if g were its first moment: descent under Adam is
    descent along it. (With amsgrad, v_hat is the maximum so far.) Entries whose second moment is 0
    get 0: embedding rows that were never updated do not move under Adam either, and dividing by eps
    would make them the largest of all. So do parameters without state. While the optimizer has no
    state for any of them, the raw ``direction`` is returned, which is logged once; what depends on
    its size (``tau``, not a KL budget) sees a jump after that first step.

    Cost: one pass over the parameters. Memory: 4 bytes for each entry.

    Raises ValueError where ``optimizer`` is None, does not hold the parameters, or keeps no
    ``exp_avg_sq`` that can be read (SGD, 8-bit, factored and sharded optimizers).
    """
    what = "precondition=True"
    parameters = {name: parameters[name] for name in direction}
    groups = _groups(parameters, optimizer, what)
    states = {name: _state(optimizer, p) for name, p in parameters.items()}
    if not any(states.values()):
        _report_cold_start(optimizer, what, "using the raw direction")
        return direction
    return {
        name: g / (root + groups[parameters[name]]["eps"])
        if (root := _root(states[name], groups[parameters[name]])) is not None
        else torch.zeros_like(g)
        for name, g in direction.items()
    }


def _state(optimizer: Any, parameter: nn.Parameter) -> Mapping[str, Any] | None:
    """What the optimizer keeps for ``parameter``, None before its first step.

    A step that was skipped (a gradient scaler met infinities) may leave moments at step 0.
    """
    state = optimizer.state.get(parameter)
    return None if not state or ("step" in state and not float(state["step"])) else state


def _first_moment(state: Mapping[str, Any], group: Mapping[str, Any], kind: str) -> Tensor:
    if isinstance(state.get("momentum_buffer"), Tensor):
        if "dampening" not in group:  # RMSprop's is preconditioned, Muon's is an average already
            raise ValueError(
                f"descent_direction: kind {kind!r} reads SGD's momentum or Adam's first moment, "
                "and this optimizer's momentum_buffer is neither. Use kind 'probe' or 'ema'."
            )
        buffer = _dense(state, "momentum_buffer", f"kind {kind!r}")
        rest = 1 - group["dampening"]  # at 0 the buffer is the first gradient, fading
        return buffer * ((1 - group["momentum"]) / rest if rest else 1.0)
    average = _dense(state, "exp_avg", f"kind {kind!r}")
    _check_adam(state, group, f"kind {kind!r}")
    return average / (1 - group["betas"][0] ** float(state["step"]))


def _root(state: Mapping[str, Any] | None, group: Mapping[str, Any]) -> Tensor | None:
    """``sqrt(v_hat)``, infinite where it is 0; None without state."""
    if not state:
        return None
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    square = _dense(state, key, "Adam's preconditioning")
    _check_adam(state, group, "Adam's preconditioning")
    root = (square / (1 - group["betas"][1] ** float(state["step"]))).sqrt()
    return root.masked_fill(square == 0, torch.inf)


def _check_adam(state: Mapping[str, Any], group: Mapping[str, Any], what: str) -> None:
    """Raises where there is a moment, and not what corrects its bias (Lion, Adafactor)."""
    missing = [n for n, place in (("betas", group), ("step", state)) if n not in place]
    if missing:
        raise ValueError(
            f"descent_direction: {what} reads the moments of torch.optim's Adam and AdamW, and "
            f"this optimizer keeps no {' and no '.join(missing)}. Use kind 'probe' or 'ema'."
        )


def _groups(parameters: Parameters, optimizer: Any, what: str) -> dict[nn.Parameter, dict]:
    """The group of each parameter in ``optimizer``."""
    if optimizer is None:
        raise ValueError(f"descent_direction: {what} needs optimizer=, the one that trains.")
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in parameters.items() if p not in groups]
    if missing:
        raise ValueError(
            f"descent_direction: {', '.join(missing[:5])} ({len(missing)} of {len(parameters)} "
            "probed parameters) are not in the optimizer. Pass the optimizer that trains this "
            "model; where it holds flattened or sharded copies (DeepSpeed, FSDP1), use kind "
            "'probe' or 'ema' without preconditioning."
        )
    return groups


def _report_cold_start(optimizer: Any, what: str, instead: str) -> None:
    if optimizer not in _reported:
        _reported.add(optimizer)
        logger.info("%s: the optimizer has no state yet; %s", what, instead)


def _dense(state: Mapping[str, Any], key: str, what: str) -> Tensor:
    """``state[key]`` in fp32 (float64 kept), or an error that names what works."""
    value = state.get(key)
    plain = type(value) in (Tensor, DTensor)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not plain:
        found = ", ".join(
            f"{k}: {type(v).__name__} {v.dtype}" if isinstance(v, Tensor) else k
            for k, v in state.items()
        )
        raise ValueError(
            f"descent_direction: {what} reads {key!r} of the optimizer's state as a plain "
            f"floating-point tensor and found {found or 'nothing'}. torch.optim's Adam and AdamW "
            "serve kinds 'momentum' and 'adam' and preconditioning, SGD with momentum serves "
            "'momentum'; for 8-bit, factored or sharded optimizers use kind 'probe' or 'ema'."
        )
    return value.to(wide(value))
