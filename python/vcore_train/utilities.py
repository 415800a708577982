"""How well each token's gradient agrees with a descent direction: ``s_t = <g, grad l_t(theta)>``.

Positive: a step against g lowers this token's loss. The paper (VCORE, arXiv 2510.27462) estimates
s_t by a finite difference of two forward passes; in 16-bit precision that measures rounding. The
default is a forward-mode derivative: one pass that carries values and tangents together, without a
graph.
"""

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakSet

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vcore_kernels import linear_nll_jvp
from vcore_kernels.perturbed import NonFiniteDirectionError
from vcore_train import attention
from vcore_train.differences import DIFFERENCE_HEADS, DifferenceHead, difference_utilities
from vcore_train.direction_tensors import norm_of
from vcore_train.dual_layers import dual_layers
from vcore_train.head_check import verify_head
from vcore_train.modeling import (
    IGNORE_INDEX,
    Head,
    causal_lm,
    check_packing,
    head_of,
    hidden_states,
    label_shift,
    probing,
    supervised_labels,
)
from vcore_train.parameter_choice import some
from vcore_train.probed import Probed, TokenUtilities, match_direction
from vcore_train.sharding import duals_in_places, reshard, unpacked, within_forward

__all__ = [
    "ForwardDerivativeError",
    "NonFiniteDirectionError",
    "TokenUtilities",
    "token_utilities",
    "token_utilities_and_nll",
]

logger = logging.getLogger("vcore_train")
Method = Literal["jvp", "central", "finite_difference"]
METHODS: tuple[Method, ...] = get_args(Method)


class ForwardDerivativeError(RuntimeError):
    """Something in the model has no forward-mode derivative; the message names it and the mend."""


def token_utilities(
    model: nn.Module,
    inputs: Mapping[str, Any],
    direction: Mapping[str, Tensor],
    *,
    method: Method = "jvp",
    epsilon: float | None = None,
    head: DifferenceHead = "linear",
    backend: str = "auto",
) -> Tensor:
    """The utility ``s_t = <g, grad l_t>`` of every supervised token.

    Dropout is off, the random number generators, training flags and the attention implementation
    are as before on return, parameters bit for bit. Autocast is the caller's: inside
    ``torch.autocast`` the probe computes as the training pass does.

    Args:
        model: a causal LM of transformers, plain or PEFT-wrapped.
        inputs: a batch with ``labels`` [B, T], padded on either side or packed
            (``cu_seq_lens_q`` or restarting ``position_ids``).
        direction: g by parameter name, as :func:`vcore_train.descent_direction` returns it.
            Parameters that it leaves out do not move. Tied parameters appear under one name.
        method: "jvp", a forward-mode derivative, exact up to the precision of the pass.
            "finite_difference", the paper's ``(l(theta) - l(theta - eps*g)) / eps``, and "central",
            ``(l(theta + eps*g) - l(theta - eps*g)) / (2*eps)``, are for comparison, and for models
            without a forward derivative: in bf16 they are far less exact.
        epsilon: step of the two differences, in units of theta / g. None searches one, in up to
            four tries: the losses shall change by about the square root (for "central" the cube
            root) of the precision in use.
        head: of the two differences. "linear" takes the change of the hidden states, in fp32,
            and the head's own direction through the head's derivative; "pair" subtracts the losses
            under the heads of both points.
        backend: of the head operators of vcore_kernels.

    Returns:
        Utilities [B, T] in nats per unit of g, fp32, aligned with ``inputs["labels"]``, 0 where not
        supervised.

    Raises:
        ValueError: direction that is empty or does not match the model, quantised or frozen
            parameters in it, epsilon <= 0, no labels, ``cu_seq_lens_q`` that cuts a trajectory,
            unknown method.
        NonFiniteDirectionError: NaN or infinity in the direction (a ValueError).
        ForwardDerivativeError: a part of the model that "jvp" cannot differentiate.
    """
    return token_utilities_and_nll(
        model,
        inputs,
        direction,
        method=method,
        epsilon=epsilon,
        head=head,
        backend=backend,
    ).utility


def token_utilities_and_nll(
    model: nn.Module,
    inputs: Mapping[str, Any],
    direction: Mapping[str, Tensor],
    *,
    method: Method = "jvp",
    epsilon: float | None = None,
    head: DifferenceHead = "linear",
    snr: bool = True,
    backend: str = "auto",
) -> TokenUtilities:
    """:func:`token_utilities` with the losses of the same pass, which cost nothing more.

    The losses are at theta for "jvp" and "finite_difference"; for "central" the mean of both
    points, which differs from them by a term in ``epsilon**2``.

    The two differences also report the step that they took and their signal-to-noise ratio ``snr``
    (rms over the supervised tokens; it takes one more forward pass, which ``snr=False`` saves), and
    warn once a model where it is below 1: see :mod:`vcore_train.differences`.
    """
    if method not in METHODS:
        raise ValueError(
            f"token_utilities: unknown method {method!r}, expected one of {', '.join(METHODS)}."
        )
    if head not in DIFFERENCE_HEADS:
        raise ValueError(
            f"token_utilities: unknown head {head!r}, expected one of "
            f"{', '.join(DIFFERENCE_HEADS)}."
        )
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(
            f"token_utilities: epsilon must be positive and finite, got {epsilon}. None chooses it."
        )
    labels = supervised_labels(inputs)
    check_packing(inputs)
    with torch.inference_mode(False), torch.no_grad():  # inference mode would drop the tangents
        reshard(model)
        probed = match_direction(model, direction)
        verify_head(model)
        if method == "jvp":
            return _forward_mode(model, inputs, labels, probed, epsilon, backend)
        return difference_utilities(
            model,
            inputs,
            labels,
            probed,
            epsilon,
            backend,
            central=method == "central",
            head=head,
            snr=snr,
        )


# ---- forward mode ----


# Models with an attention layer that "vcore_jvp" turned out not to compute.
_eager_attention: WeakSet[nn.Module] = WeakSet()


def _forward_mode(model, inputs, labels, probed, epsilon, backend) -> TokenUtilities:
    if epsilon is not None:
        raise ValueError("token_utilities: method 'jvp' takes no epsilon; it is a derivative.")

    def run() -> TokenUtilities:
        return utilities_of(dual_pass(model, inputs, probed), labels, label_shift(inputs), backend)

    try:
        return within_forward(model, model, run)
    finally:
        reshard(model)


class DualPass(NamedTuple):
    """What the head reads and is, and their tangents times ``scale``; None does not move."""

    hidden: Tensor  # [B, T, H]
    hidden_tangent: Tensor  # [B, T, H]
    head: Head
    weight_tangent: Tensor | None
    bias_tangent: Tensor | None
    scale: float


def dual_pass(
    model: nn.Module,
    inputs: Mapping[str, Any],
    probed: Mapping[str, Probed],
    *,
    graph: bool = False,
) -> DualPass:
    """The decoder with values and tangents, dropout off. The head itself is not run.

    With ``graph`` (and gradients enabled) the values carry the autograd graph of an ordinary
    forward pass; tangents carry none. A tensor that an operation of PyTorch's saves keeps its
    tangent until the pass ends.
    """
    lm = causal_lm(model)
    if attention.serves(lm) and lm not in _eager_attention:
        try:
            return _dual_pass(model, inputs, probed, attention.NAME, graph)
        except attention.AttentionUnsupportedError as error:
            _eager_attention.add(lm)
            logger.info("token_utilities: %s Eager attention serves this model.", error)
    return _dual_pass(model, inputs, probed, "eager", graph)


def _dual_pass(model, inputs, probed, implementation, graph) -> DualPass:
    scale = _tangent_scale(model, probed)
    tangents = {
        name: _scaled(p.direction, scale)
        for name, p in probed.items()
        if p.moves and p.of_operator is None
    }
    with probing(model, attention=implementation), dual_layers(model), fwAD.dual_level():
        with (
            _explained(model),
            duals_in_places(model, tangents, graph=graph),
            _PlainTangents() if graph else _NoLostTangents(),
        ):
            hidden, head = hidden_states(model, inputs), head_of(model)
        hidden, hidden_tangent = fwAD.unpack_dual(hidden)
        weight, weight_tangent = unpacked(head.weight)
        bias, bias_tangent = (None, None) if head.bias is None else unpacked(head.bias)
    for p in probed.values():
        if p.of_operator == "weight":
            weight_tangent = _scaled(p.direction, scale)
        elif p.of_operator == "bias":
            bias_tangent = _scaled(p.direction, scale)
    if hidden_tangent is None:
        _check_only_head(probed)
        hidden_tangent = torch.zeros_like(hidden)
    head = replace(head, weight=weight, bias=bias)
    return DualPass(hidden, hidden_tangent, head, weight_tangent, bias_tangent, scale)


def utilities_of(dual: DualPass, labels: Tensor, shift: int, backend: str) -> TokenUtilities:
    """The losses under the head and their tangents."""
    nll, tangent = linear_nll_jvp(
        dual.hidden,
        dual.head.weight,
        labels,
        dual.hidden_tangent,
        dual.weight_tangent,
        bias_tangent=dual.bias_tangent,
        ignore_index=IGNORE_INDEX,
        shift=shift,
        backend=backend,
        **dual.head.options(),
    )
    return TokenUtilities(tangent / dual.scale, nll)


def _tangent_scale(model: nn.Module, probed: Mapping[str, Probed]) -> float:
    """A power of two that brings the direction's norm near 1 where float16 would underflow."""
    device = next(iter(probed.values())).parameter.device.type
    dtypes = {p.dtype for p in model.parameters()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    if torch.float16 not in dtypes:
        return 1.0
    norm = norm_of([p.direction for p in probed.values()])
    return 2.0 ** -round(math.log2(norm)) if norm else 1.0


def _scaled(direction: Tensor, scale: float) -> Tensor:
    return direction if scale == 1.0 else direction * scale


def _check_only_head(probed: Mapping[str, Probed]) -> None:
    """Raises where a parameter moves that should have moved the hidden states, and they did not."""
    lost = [name for name, p in probed.items() if p.moves and not p.of_head]
    if lost:
        raise ForwardDerivativeError(
            f"token_utilities: {some(lost)} have a direction, but the decoder's hidden states "
            "came out without a tangent: something in the model detaches them, so every utility "
            "would be zero. Use method='central', or take the detaching wrapper off."
        )


class _NoLostTangents(TorchFunctionMode):
    """Raises where a custom operator takes a tangent in and gives none out.

    Operators made with ``torch.library.custom_op`` do that without a word, and zero is then a wrong
    derivative. PyTorch's own operators raise by themselves.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        custom = isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) and str(
            func
        ).split(".")[0] not in ("aten", "prims")
        if custom:
            floats = [t for t in torch.utils._pytree.tree_leaves(out) if _is_floating(t)]
            given = torch.utils._pytree.tree_leaves((args, kwargs))
            if (
                floats
                and any(_is_floating(t) and _has_tangent(t) for t in given)
                and not any(_has_tangent(t) for t in floats)
            ):
                raise NotImplementedError(f"forward AD: operator {func} drops the tangent")
        return out


class _PlainTangents(_NoLostTangents):
    """Cuts the graph that PyTorch records on a tangent beside the one on its primal.

    What that graph had saved is freed at once.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        if isinstance(out, Tensor):
            return _without_tangent_graph(out)
        if isinstance(out, tuple | list):
            return torch.utils._pytree.tree_map_only(Tensor, _without_tangent_graph, out)
        return out


def _without_tangent_graph(tensor: Tensor) -> Tensor:
    primal, tangent = fwAD.unpack_dual(tensor)
    if tangent is None or not tangent.requires_grad:
        return tensor
    if tangent._is_view():  # PyTorch detaches no view in its place
        return fwAD.make_dual(primal, tangent.detach())
    tangent.detach_()
    return tensor


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _has_tangent(tensor: Tensor) -> bool:
    return fwAD.unpack_dual(tensor).tangent is not None


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Turns PyTorch's complaint about a missing derivative into one that names the module."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if not re.search(r"forward[- ](mode )?(AD|automatic)|\bjvp\b", str(error), re.IGNORECASE):
            raise
        names = {id(module): name for name, module in model.named_modules()}
        where, trace = "the model", error.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if id(module) in names:
                where = f"{names[id(module)] or 'the model'} ({type(module).__name__})"
            trace = trace.tb_next
        reason = str(error).splitlines()[0]
        raise ForwardDerivativeError(
            f"token_utilities: {where} has no forward-mode derivative: {reason} Use the PyTorch "
            "version of it for the probe (no fused, quantised or compiled kernel), or "
            "method='central'."
        ) from error
