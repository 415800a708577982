"""Puts the layers of :mod:`vcore_train.dual_ops` into a model for the time of a dual pass.

Linear products are caught wherever they are called. Norms, gated MLPs and LoRA layers are modules
that are recognised by what they are made of, and whose own forward must agree with the replacement
on random inputs before it is used. What is not recognised, has hooks or a forward of its own runs
as it is, through PyTorch's forward mode.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers.activations import GELUTanh, SiLUActivation

from vcore_train import dual_ops
from vcore_train.sharding import gathered, unit_modules

__all__ = ["dual_layers"]

logger = logging.getLogger("vcore_train")
# How far a module's own forward and its replacement may be apart, in machine epsilons of its dtype
# relative to the largest value of a row: the replacement rounds less often.
_TOLERANCE = 4


@contextmanager
def dual_layers(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` computes on dual tensors by :mod:`vcore_train.dual_ops`.

    To be entered in eval mode, outside of a dual level or before any parameter is dual: modules
    seen for the first time are verified. On leaving, by an exception too, all is as before.
    """
    replaced = []
    counts: Counter[str] = Counter()
    for unit, modules in unit_modules(model):
        if any((kind := _kind(m)) and not _is_known(m) and not _is_touched(m) for m in modules):
            with gathered(unit, modules):  # they are verified with their weights
                for module in modules:
                    if kind := _kind(module):
                        _replacement(module, kind)
    try:
        for module in model.modules():
            kind = _kind(module)
            if kind is None:
                continue
            forward = _replacement(module, kind)
            counts[f"{type(module).__name__}{'' if forward else ', left alone'}"] += 1
            if forward is not None:
                module.forward = forward
                replaced.append(module)
        if replaced or counts:
            logger.debug("dual pass: %s", dict(counts))
        with _Linears():
            yield
    finally:
        for module in replaced:
            del module.forward


class _Linears(TorchFunctionMode):
    """F.linear on dual tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear and not torch.compiler.is_compiling():
            tensors = (*args, *kwargs.values())
            plain = all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
            if plain and any(map(dual_ops.has_tangent, tensors)):
                if "input" in kwargs:  # PyTorch's name of the first argument
                    args = (kwargs["input"],)
                    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
                return dual_ops.linear(*args, **kwargs)
        return func(*args, **kwargs)


# ---- which modules ----

# The forward and activation that were compared, and what was found.
_verified: WeakKeyDictionary[nn.Module, tuple[tuple, Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Kind:
    """A sort of module and how to replace its forward."""

    verify: Callable[[nn.Module], Any]  # what the replacement needs to know, None: unlike it
    forward: Callable[[Any, Any, Tensor], Any]  # (module, what verify returned, input)


def _kind(module: nn.Module) -> _Kind | None:
    if type(module) is LoraLinear:
        return _LORA
    if {name for name, _ in module.named_children()} == _GATED_CHILDREN:
        return _GATED
    if type(module).__name__.endswith("RMSNorm"):
        return _NORM
    return None


def _replacement(module: nn.Module, kind: _Kind) -> Callable[..., Any] | None:
    if any(_is_touched(m) for m in module.modules()):
        return None
    if not _is_known(module):
        _verified[module] = _compared(module), _verify(module, kind)
    facts = _verified[module][1]
    return None if facts is None else partial(_forward, module, kind, facts)


def _compared(module: nn.Module) -> tuple:
    # A class may be given another forward, too.
    return type(module).forward, getattr(module, "act_fn", None)


def _is_known(module: nn.Module) -> bool:
    return module in _verified and _verified[module][0] == _compared(module)


def _verify(module: nn.Module, kind: _Kind) -> Any:
    try:
        return kind.verify(module)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        # It takes other arguments, or other dtypes, than the replacement.
        logger.debug("dual pass: %s is left alone: %s", type(module).__name__, error)
        return None


def _forward(module: nn.Module, kind: _Kind, facts: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The replacement, where the call has its one argument and nothing else.

    Not where torch.compile traces it, which sees no tangents: what it traced would drop them.
    """
    if torch.compiler.is_compiling() or len(args) != 1 or kwargs:
        return _own(module, *args, **kwargs)
    return kind.forward(module, facts, args[0])


def _is_touched(module: nn.Module) -> bool:
    """Whether somebody hooked ``module`` or gave this instance another forward."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


def _agree(value: Tensor, expected: Any, dtype: torch.dtype) -> bool:
    """Within the rounding of ``dtype``, row by row, so that large rows (which a clamp would cut)
    and small ones both count. Rows of zeros agree with anything, so they prove nothing."""
    if not isinstance(expected, Tensor):
        return False
    if (value.shape, value.dtype) != (expected.shape, expected.dtype):
        return False
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    value, expected = value.double(), expected.double()
    error, size = (value - expected).abs().amax(-1), expected.abs().amax(-1)
    return bool(((error <= _TOLERANCE * eps * size) & (size > 0)).all())


def _rows(
    width: int, like: Tensor, dtype: torch.dtype | None = None, sizes: tuple = (0.1, 1.0, 30.0)
) -> Tensor:
    """Random rows [1, len(sizes), width] of these sizes."""
    rows = torch.randn(1, len(sizes), width, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.tensor(sizes)[:, None]
    return rows.to(like.device, dtype or like.dtype)


# ---- RMSNorm ----


@dataclass(frozen=True)
class _NormFacts:
    eps: str  # the attribute's name
    offset: float
    promotes: bool  # Llama's returns what weight and input promote to, Gemma's the input's dtype

    def out_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, weight.dtype) if self.promotes else x.dtype


def _verify_norm(module: nn.Module) -> _NormFacts | None:
    weight = getattr(module, "weight", None)
    eps = next((n for n in ("variance_epsilon", "eps") if hasattr(module, n)), None)
    if eps is None or not isinstance(getattr(module, eps), float):
        return None
    if type(weight) is not nn.Parameter or weight.dim() != 1 or weight.is_meta:
        return None
    if len(list(module.parameters())) != 1 or list(module.children()):
        return None
    scale = 0.5 + torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    scale = scale.to(weight.device, weight.dtype)
    for facts in (_NormFacts(eps, o, p) for o in (0.0, 1.0) for p in (True, False)):
        if all(_norm_agrees(module, facts, scale, d) for d in (weight.dtype, torch.bfloat16)):
            return facts
    return None


def _norm_agrees(module: nn.Module, facts: _NormFacts, weight: Tensor, dtype: torch.dtype) -> bool:
    """With ``weight`` in the place of the module's, on rows of ``dtype``."""
    x = _rows(len(weight), weight, dtype)
    expected = functional_call(module, {"weight": weight}, (x,))
    eps = getattr(module, facts.eps)
    value = dual_ops.plain_rms_norm(x, weight, eps, facts.offset, facts.out_dtype(x, weight))
    return _agree(value, expected, dtype)


def _norm(module: nn.Module, facts: _NormFacts, x: Tensor) -> Any:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not (dual_ops.has_tangent(x) or dual_ops.has_tangent(weight)):
        return _own(module, x)
    return dual_ops.rms_norm(
        x, weight, getattr(module, facts.eps), facts.offset, facts.out_dtype(x, weight)
    )


_NORM = _Kind(_verify_norm, _norm)


# ---- gated MLP ----

_GATED_CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _verify_gated(module: Any) -> str | None:
    """The name of the activation."""
    act = module.act_fn
    if isinstance(act, nn.SiLU | SiLUActivation):
        activation = "silu"
    elif isinstance(act, GELUTanh) or (isinstance(act, nn.GELU) and act.approximate == "tanh"):
        activation = "gelu_tanh"
    else:
        return None
    gate = module.gate_proj
    weight = next(gate.parameters(), None)
    width = getattr(gate, "in_features", None)
    if width is None or weight is None or not weight.is_floating_point() or weight.is_meta:
        return None
    # Some architectures clamp inside, at 7 or 16, say, which only the outliers of a trained model
    # reach: the last row goes beyond. (In float16 it would overflow.)
    far = 300.0 if weight.dtype == torch.float16 else 1e5
    x = _rows(width, weight, sizes=(0.1, 1.0, 30.0, far))
    product = dual_ops.ACTIVATIONS[activation](gate(x)) * module.up_proj(x)
    agrees = _agree(module.down_proj(product), _own(module, x), x.dtype)
    return activation if agrees else None


def _gated(module: Any, activation: str, x: Tensor) -> Any:
    return module.down_proj(dual_ops.gated(module.gate_proj(x), module.up_proj(x), activation))


_GATED = _Kind(_verify_gated, _gated)


# ---- LoRA ----


def _verify_lora(module: Any) -> bool | None:
    if not _is_plain_lora(module):
        return None
    weight = module.base_layer.weight
    x = _rows(module.in_features, weight)
    generator = torch.Generator().manual_seed(1)
    parameters = {
        f"{part}.{name}.weight": torch.randn(
            getattr(module, part)[name].weight.shape, generator=generator
        ).to(getattr(module, part)[name].weight)
        for name in _adapters(module)
        for part in ("lora_A", "lora_B")
    }  # lora_B starts at zero
    expected = functional_call(module, parameters, (x,))
    y = result = module.base_layer(x)
    for name in _adapters(module):
        a, b = (parameters[f"{part}.{name}.weight"] for part in ("lora_A", "lora_B"))
        y = dual_ops.low_rank_update(y, x, a, b, module.scaling[name], result.dtype)
    return _agree(y, expected, y.dtype) or None


def _is_plain_lora(module: Any) -> bool:
    """Plain LoRA on a plain linear layer, not merged and with dropout off."""
    if module.disable_adapters or module.merged or not module.cast_input_dtype_enabled:
        return False
    base = module.base_layer
    if type(base) is not nn.Linear or not base.weight.is_floating_point() or base.weight.is_meta:
        return False
    names = _adapters(module)
    return bool(names) and all(
        name not in module.lora_variant
        and type(module.lora_A[name]) is nn.Linear
        and type(module.lora_B[name]) is nn.Linear
        and module.lora_B[name].bias is None
        and not (isinstance(module.lora_dropout[name], nn.Dropout) and module.training)
        for name in names
    )


def _adapters(module: Any) -> list[str]:
    return [name for name in module.active_adapters if name in module.lora_A]


def _lora(module: Any, verified: bool, x: Tensor) -> Any:
    if not _is_plain_lora(module) or not _moves(module, x):
        return _own(module, x)
    y = module.base_layer(x)
    dtype = y.dtype
    for name in _adapters(module):
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        y = dual_ops.low_rank_update(y, x, a, b, module.scaling[name], dtype)
    return y


def _moves(module: Any, x: Tensor) -> bool:
    return dual_ops.has_tangent(x) or any(
        dual_ops.has_tangent(part[name].weight)
        for name in _adapters(module)
        for part in (module.lora_A, module.lora_B)
    )


_LORA = _Kind(_verify_lora, _lora)
