"""Models that are sharded over processes by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Parameters of such a model are DTensors; FSDP gathers those of one unit at a time around its forward
and backward. What goes past the model's own forward, as all losses here do, has to stand where FSDP
expects it: :func:`within_forward`. A forward-mode pass needs the tangents gathered beside the
weights: :func:`duals_in_places`. On a model that is not sharded both do the plain thing, so their
callers do not ask.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor

from vcore_train.direction_tensors import local
from vcore_train.modeling import causal_lm
from vcore_train.parameter_choice import some
from vcore_train.processes import Processes

Result = TypeVar("Result")
# The name since PyTorch 2.13 and the one before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def vocabulary_parallel(model: nn.Module) -> dict[nn.Parameter, str]:
    """Weight and bias of a head that is sharded along the vocabulary (tensor parallel), as DTensors
    that stay shards in every pass. Of models sharded by FSDP none is."""
    head: Any = causal_lm(model).get_output_embeddings()
    if is_sharded(model):
        return {}
    own = {name: head._parameters.get(name) for name in ("weight", "bias")}
    return {p: name for name, p in own.items() if isinstance(p, DTensor)}  # type: ignore[misc]


def sharing_processes(model: nn.Module) -> list[Processes]:
    """The groups over which FSDP averages gradients: shards, and replicas of hybrid sharding."""
    for p in model.parameters() if is_sharded(model) else ():
        if isinstance(p, DTensor):
            return [Processes(p.device_mesh.get_group(d)) for d in range(p.device_mesh.ndim)]
    return []


def reshard(model: nn.Module) -> None:
    """Every unit back to its shards. A pass without a backward leaves some gathered, and then they
    would neither see a step of the optimizer nor be what ``model.parameters()`` gives."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def unit_modules(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The units of FSDP, each with the modules whose parameters it holds."""
    units: dict[nn.Module, list[nn.Module]] = {}

    def walk(module: nn.Module, unit: nn.Module | None) -> None:
        unit = module if isinstance(module, FSDPModule) else unit
        if unit is not None:
            units.setdefault(unit, []).append(module)
        for child in module.children():
            walk(child, unit)

    walk(model, None)
    yield from units.items()


@contextmanager
def gathered(unit: Any, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the parameters of ``unit``, which ``modules`` hold, are whole."""
    own = [p for m in modules for p in m._parameters.values()]
    sharded = any(isinstance(p, DTensor) for p in own)
    if sharded:
        unit.unshard()
    try:
        yield
    finally:
        if sharded:
            unit.reshard()


def within_forward(wrapper: nn.Module, model: nn.Module, function: Callable[[], Result]) -> Result:
    """``function()``, in which losses of ``model`` are computed past its own forward.

    ``wrapper`` is ``model`` or a wrapper such as DDP around it. DDP and FSDP2 prepare the backward
    pass around the forward of the module that they hold, so a loss computed beside it would leave
    gradients without synchronisation. For FSDP2 the head is gathered as well, since its forward is
    not called. Where nothing is wrapped or sharded it is a plain call.
    """
    root = wrapper if wrapper is not model else _root(model)
    if root is None:
        return function()
    inner: nn.Module = model if wrapper is not model else root
    own = vars(inner).get("forward")
    results: list[Result] = []

    def redirected() -> Any:
        _put_forward(inner, own)
        head = causal_lm(model).get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
        results.append(function())
        return results[0]

    inner.forward = redirected  # type: ignore[method-assign]
    try:
        out = root()
    except BaseException:
        _end_forward(model)
        raise
    finally:
        _put_forward(inner, own)
    # FSDP casts what comes out (a loss, to bfloat16); its hooks are on what went in.
    return out if wrapper is not model else results[0]


def _end_forward(model: nn.Module) -> None:
    """After an exception: units that FSDP believes in their forward pass would stay gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            state._training_state = TrainingState.IDLE
            for group in state._fsdp_param_groups:
                group._training_state = TrainingState.IDLE
            state._state_ctx.iter_forward_root = None
            state._modules_to_run_forward.clear()
            module.reshard()


def _put_forward(module: nn.Module, own: Any) -> None:
    if own is None:
        vars(module).pop("forward", None)
    else:
        module.forward = own


def _root(model: nn.Module) -> nn.Module | None:
    """The FSDP module around decoder and head, which has to run first; None if nothing is sharded.

    Raises ValueError where only parts of the model are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            root: Any = module
            if causal_lm(model) in set(root.modules()):
                return root
            raise ValueError(
                f"parts of {type(model).__name__} are sharded by FSDP2, and the model itself is "
                "not. Call fully_shard(model) after its parts."
            )
    return None


def sharded_gradients(
    model: nn.Module, loss_of: Callable[[], Tensor], leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the sum over all ranks of ``loss_of()``, sharded as the leaves are.

    FSDP reduces gradients into ``.grad`` and no other way; what stood there, and what micro-batches
    before have left unreduced, stands there again.

    Raises ValueError for trained parameters that FSDP does not hold.
    """
    groups: set[Any] = {
        group
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
    }
    ranks = math.prod(processes.count for processes in sharing_processes(model))
    factors = {
        p.sharded_param: g.gradient_divide_factor or ranks for g in groups for p in g.fsdp_params
    }
    others = [n for n, p in model.named_parameters() if p.requires_grad and p not in factors]
    if others:
        raise ValueError(
            f"descent_direction: {some(others)} are trained and not sharded, beside parameters "
            "that FSDP2 shards. Their gradients would be each rank's own. Shard the whole model "
            "(no ignored_params, adapters before fully_shard)."
        )
    with _set_aside_gradients(model, groups):
        within_forward(model, model, loss_of).backward()
        gradients = [leaf.grad for leaf in leaves]
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                local(gradient).mul_(factors[leaf])
        return gradients


@contextmanager
def _set_aside_gradients(model: nn.Module, groups: set[Any]) -> Iterator[None]:
    """Inside there are no gradients, and FSDP reduces those that come."""
    kept: list[tuple[Any, str, Any]] = [(p, "grad", p.grad) for p in model.parameters()]
    for group in groups:
        kept += [
            (group, name, getattr(group, name))
            for name in ("reduce_grads", "all_reduce_grads", "_partial_reduce_output")
        ]
        for p in group.fsdp_params:
            kept.append((p, "unsharded_accumulated_grad", p.unsharded_accumulated_grad))
            if hasattr(p, "_unsharded_param"):
                kept.append((p._unsharded_param, "grad", p._unsharded_param.grad))
    try:
        for holder, name, _ in kept:
            setattr(holder, name, True if name.endswith("reduce_grads") else None)
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


# ---- tangents ----


def unpacked(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Value and tangent of a dual tensor, which a DTensor never is."""
    if isinstance(tensor, DTensor):
        return tensor, None
    dual = fwAD.unpack_dual(tensor)
    return dual.primal, dual.tangent


class _Place(NamedTuple):
    """Where a module holds a parameter."""

    module: nn.Module
    name: str
    parameter: nn.Parameter


@contextmanager
def duals_in_places(
    model: nn.Module, direction: Mapping[str, Tensor], *, graph: bool = False
) -> Iterator[None]:
    """Inside, the parameters named in ``direction`` are dual tensors wherever a module holds them.

    Enter it in a dual level and, for FSDP2, in :func:`within_forward`. A unit of FSDP gets its
    duals when its forward begins, the tangents gathered by one collective from shards like the
    parameters' own, and loses them when it ends; the root and the head have theirs all the while.
    The values are detached unless ``graph``.
    """
    head, root = causal_lm(model).get_output_embeddings(), _root(model)
    # By name: a parameter that FSDP has gathered is another object than the one it shards.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tangents = {parameters[name]: tangent for name, tangent in direction.items()}
    units: dict[nn.Module | None, list[_Place]] = {}
    in_units: set[nn.Module] = set()
    for its_unit, modules in unit_modules(model):
        units[its_unit] = _places(modules, tangents)
        in_units.update(modules)
    units[None] = _places([m for m in model.modules() if m not in in_units], tangents)
    with ExitStack() as stack:
        for unit, places in units.items():
            if not places:
                continue
            if unit is None or unit is root or unit is head:
                stack.enter_context(_swapped(places, tangents, graph))
            else:
                _swap_in_forward(stack, unit, places, tangents, graph)
        yield


def _places(modules: Iterable[nn.Module], tangents: Mapping[nn.Parameter, Tensor]) -> list[_Place]:
    return [
        _Place(module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in tangents
    ]


def _swap_in_forward(stack, unit, places, tangents, graph) -> None:
    swapped: list[ExitStack] = []

    def enter(*_: Any) -> None:
        inside = ExitStack()
        inside.enter_context(_swapped(places, tangents, graph))
        swapped.append(inside)

    def leave(*_: Any) -> None:
        if swapped:
            swapped.pop().close()

    # After FSDP has gathered the weights, and before it gives them up.
    stack.callback(unit.register_forward_pre_hook(enter).remove)
    stack.callback(unit.register_forward_hook(leave, prepend=True, always_call=True).remove)
    stack.callback(leave)


@contextmanager
def _swapped(places, tangents, graph) -> Iterator[None]:
    """Duals in ``places``, made of the plain parameters that stand there now."""
    before = [(place, place.module._parameters[place.name]) for place in places]
    values = {place.parameter: value for place, value in before}
    gathered = _gathered({p: tangents[p].to(value.dtype) for p, value in values.items()})
    duals = {
        p: fwAD.make_dual(value if graph else value.detach(), gathered[p])
        for p, value in values.items()
    }
    try:
        for place in places:
            place.module._parameters[place.name] = duals[place.parameter]
        yield
    finally:
        for place, value in before:
            place.module._parameters[place.name] = value


def _gathered(tangents: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """The whole of each tangent; shards along the first dimension by one collective for all."""
    whole = {p: t for p, t in tangents.items() if not isinstance(t, DTensor)}
    sharded: dict[Any, dict[nn.Parameter, DTensor]] = {}
    for p, t in tangents.items():
        if not isinstance(t, DTensor):
            continue
        dims = [d for d, placement in enumerate(t.placements) if not placement.is_replicate()]
        if len(dims) == 1 and t.placements[dims[0]].is_shard(0):
            sharded.setdefault((t.device_mesh, dims[0], t.dtype), {})[p] = t
        else:
            whole[p] = t.full_tensor()
    for (mesh, dim, _), parts in sharded.items():
        whole.update(zip(parts, _gathered_rows(list(parts.values()), mesh, dim), strict=True))
    return whole


def _gathered_rows(tangents: list[DTensor], mesh: Any, dim: int) -> list[Tensor]:
    size = mesh.size(dim)
    rows = [-(-t.shape[0] // size) for t in tangents]  # of a shard; the last ones may have less
    entries = [n * math.prod(t.shape[1:]) for n, t in zip(rows, tangents, strict=True)]
    # FSDP may keep its shards in host memory; collectives run on the mesh's device.
    sent = torch.zeros(sum(entries), dtype=tangents[0].dtype, device=mesh.device_type)
    for part, tangent in zip(sent.split(entries), tangents, strict=True):
        shard = local(tangent)
        part[: shard.numel()] = shard.flatten()
    received = sent.new_empty(size * sent.numel())
    _all_gather(received, sent, group=mesh.get_group(dim))
    return [
        part.reshape(size * n, *t.shape[1:])[: t.shape[0]]
        for part, n, t in zip(
            received.view(size, -1).split(entries, dim=1), rows, tangents, strict=True
        )
    ]
