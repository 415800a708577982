"""The descent direction g that utilities are taken against: an estimate of the population gradient.

Every kind is gradient-like, ``theta - eps * g`` descends, and comes as fp32 tensors by parameter
name (float64 for float64 parameters).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vcore_train.direction_states import KINDS, DirectionState, EmaDirection
from vcore_train.direction_tensors import (
    Direction,
    check_finite,
    clip_direction,
    local,
    norm_of,
    wide,
)
from vcore_train.head_check import verify_head
from vcore_train.modeling import (
    IGNORE_INDEX,
    Head,
    causal_lm,
    check_packing,
    head_of,
    label_shift,
    probing,
    supervised_labels,
    token_nll,
)
from vcore_train.optimizer_moments import first_moments, preconditioned
from vcore_train.parameter_choice import Params, chosen_parameters, head_alone
from vcore_train.processes import Processes
from vcore_train.sharding import is_sharded, reshard, sharded_gradients, sharing_processes

__all__ = [
    "Batch",
    "Direction",
    "DirectionState",
    "EmaDirection",
    "Kind",
    "check_finite",
    "clip_direction",
    "descent_direction",
    "norm_of",
    "read_direction",
    "uniform_gradient",
    "update_direction",
]

Kind = Literal["probe", "ema", "momentum", "adam"]
Batch = Mapping[str, Any]


def descent_direction(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    kind: Kind = "probe",
    optimizer: torch.optim.Optimizer | None = None,
    ema: EmaDirection | None = None,
    params: Params = "all",
    precondition: bool = False,
    max_norm: float | None = None,
    num_items: int | None = None,
    processes: Processes | None = None,
    backend: str = "auto",
) -> Direction:
    """The direction of steepest descent of the uniform loss, estimated in one of four ways.

    ======== ========================================================= ============ ===============
    kind     estimate                                                  passes       bytes an entry
    ======== ========================================================= ============ ===============
    probe    gradient of the uniform loss over ``batches`` (the paper, F + B        4
             arXiv 2510.27462), see :func:`uniform_gradient`
    ema      running average ``ema`` of such gradients, this one taken F + B        8
             in: far better than one batch
    momentum the optimizer's first moment                              none         4
    adam     the first moment over the root of the second              none         8
    ======== ========================================================= ============ ===============

    F and B are a forward and a backward of ``batches`` (with a subset of the parameters B ends at
    the first of them), an entry is one of the chosen parameters'. "momentum" and "adam" average
    *reweighted* gradients, those that this direction brought about: see
    :class:`~vcore_train.direction_states.MomentumDirection`. They need batches only for a cold
    start: while the optimizer has no state yet, they log so and fall back to "probe".

    Args:
        model: a causal LM of transformers, plain or PEFT-wrapped.
        batches: one batch with ``labels`` or several.
        optimizer: for "momentum", "adam" and ``precondition``: the one that trains ``model``, a
            torch.optim optimizer or Accelerate's wrapper around one.
        ema: for "ema": the average, updated in place.
        params: which parameters are in the direction: "all" that are trained, "lm_head",
            "last_<k>_layers", names, patterns: see
            :func:`~vcore_train.parameter_choice.chosen_parameters`.
        precondition: give ``g / (sqrt(v_hat) + eps)``, with the second moment of ``optimizer``
            (Adam's kin), for g of any kind: see
            :func:`~vcore_train.optimizer_moments.preconditioned`. 4 more bytes an entry. An
            average holds raw gradients and is preconditioned when it is read.
        max_norm: clips the estimate to this Euclidean norm, as the released VCORE code does (with
            1); before it enters an average, before it is preconditioned.
        num_items, processes: see :func:`uniform_gradient`, also for sharded models.
        backend: of the head operators of vcore_kernels.

    Raises:
        ValueError: unknown kind, ``optimizer`` or ``ema`` missing, an optimizer that cannot serve
            (8-bit or sharded state), no supervised token, no trainable parameter, ``params`` that
            choose none, "adam" to be preconditioned twice.
        NonFiniteDirectionError: for "ema", a gradient with NaN or infinity; the average is
            unchanged.
    """
    if kind not in KINDS:
        raise ValueError(
            f"descent_direction: unknown kind {kind!r}, expected one of {', '.join(KINDS)}."
        )
    if kind == EmaDirection.kind and ema is None:
        raise ValueError("descent_direction: kind 'ema' needs ema=EmaDirection(decay).")
    if precondition and KINDS[kind].preconditioned:
        raise ValueError(
            f"descent_direction: kind {kind!r} is preconditioned already. Drop precondition=True, "
            "or use kind 'momentum' with it, which is the same."
        )
    state = ema if kind == EmaDirection.kind and ema is not None else KINDS[kind]()
    update_direction(
        state,
        model,
        batches,
        optimizer=optimizer,
        params=params,
        max_norm=max_norm,
        num_items=num_items,
        processes=processes,
        backend=backend,
    )
    direction = read_direction(state, model, optimizer=optimizer, precondition=precondition)
    return state.direction() if state is ema and direction is state.tensors else direction


def update_direction(
    state: DirectionState,
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    params: Params = "all",
    max_norm: float | None = None,
    weight: float = 1.0,
    num_items: int | None = None,
    processes: Processes | None = None,
    backend: str = "auto",
) -> None:
    """Takes a new estimate into ``state``; the arguments are those of :func:`descent_direction`.

    ``batches`` are read where ``state`` wants gradients, or its optimizer has no moments yet;
    ``weight`` says how many probe batches they are.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"descent_direction: max_norm must be positive or None, got {max_norm}.")
    estimate = None
    reshard(model)
    if state.of_optimizer:
        estimate = first_moments(chosen_parameters(model, params), optimizer, state.kind)
    if estimate is None:
        estimate = uniform_gradient(
            model,
            batches,
            params=params,
            num_items=num_items,
            processes=processes,
            backend=backend,
        )
    state.update(clip_direction(estimate, max_norm), weight)


def read_direction(
    state: DirectionState,
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    precondition: bool = False,
) -> Direction:
    """The direction of ``state``, preconditioned with the optimizer's second moment of now.

    Without preconditioning these are the tensors of ``state`` itself, for reading only.
    """
    if not (precondition or state.preconditioned):
        return state.tensors
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return preconditioned(state.tensors, parameters, optimizer)


def uniform_gradient(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    params: Params = "all",
    num_items: int | None = None,
    processes: Processes | None = None,
    backend: str = "auto",
) -> Direction:
    """Gradient of the mean loss per supervised token of all ``batches``, each weighing the same.

    Dropout is off; gradient checkpointing stays on where it is; autocast is the caller's. The
    parameters' ``.grad`` is neither read nor written. Sums are kept in fp32. A batch without
    supervised tokens counts for nothing and is not run.

    Cost: a forward and a backward of every batch. With a subset of the parameters the backward
    ends at the first of them in the model, and what comes before it keeps no graph.

    Of a model that is sharded by FSDP2 the gradient is that over the batches of all its ranks, as
    DTensors sharded as the parameters are; each rank passes as many batches as the others, which
    all are run, and reads and restores ``.grad``. Its sums are in the policy's ``reduce_dtype``.

    Args:
        params: as in :func:`descent_direction`.
        num_items: divisor instead of the number of supervised tokens in ``batches``.
        processes: those that share the batches, each with a whole copy of the model (DDP, whose
            inner module is to be passed): the result is that over the batches of all.

    Raises:
        ValueError: no supervised token in any batch, no trainable parameter, ``params`` that choose
            none, labels missing, ``cu_seq_lens_q`` that cuts a trajectory.
    """
    if num_items is not None and num_items <= 0:
        raise ValueError(f"descent_direction: num_items must be positive, got {num_items}.")
    reshard(model)
    parameters = chosen_parameters(model, params)
    verify_head(model)
    # The head's use alone of a tied weight is a leaf of its own, which only the head reads.
    leaves: dict[str, Tensor] = dict(parameters)
    head, alone = None, head_alone(model)
    if alone is not None and alone in parameters:
        if is_sharded(model):
            raise ValueError(
                f"descent_direction: {alone} is tied to the embeddings, and of a sharded model the "
                "head's use alone cannot be probed. Choose other parameters."
            )
        leaves[alone] = parameters[alone].detach().requires_grad_()
        head = replace(head_of(model), weight=leaves[alone])
    sharded = is_sharded(model)
    total: Direction = {}
    tokens = seen = 0
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        seen += 1
        count = int((supervised_labels(batch) != IGNORE_INDEX).sum())
        # Of a sequence that processes share (label shift 0), each runs its part with the others.
        if count == 0 and not sharded and label_shift(batch):
            continue
        tokens += count
        check_packing(batch)
        with (
            torch.enable_grad(),
            probing(model, attention=None, checkpointing=True),
            _graph_from(model, [p for name, p in leaves.items() if name != alone]),
        ):
            take = sharded_gradients if sharded else _gradients
            gradients = take(
                model,
                partial(_total_nll, model, batch, head, backend),
                list(leaves.values()),
            )
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                if name in total:
                    total[name] += gradient
                else:
                    total[name] = gradient.to(wide(gradient))
    total = {
        name: total[name] if name in total else torch.zeros_like(p, dtype=wide(p)).detach()
        for name, p in parameters.items()
    }
    counts = torch.tensor([tokens, seen], device=next(model.parameters()).device)
    for group in sharing_processes(model) if sharded else [processes or Processes()]:
        counts = group.sum(counts)
    if not sharded and processes is not None:
        processes.sum_(list(total.values()))
    tokens, seen = counts.tolist()
    if tokens == 0 and num_items is None:
        raise ValueError(
            f"descent_direction: none of the {seen} batches has a supervised token (a label that "
            "is not -100 and not the first of its sequence). Are the prompts cut so long that no "
            "response is left?"
        )
    shards = [local(g) for g in total.values()]
    torch._foreach_div_(shards, tokens if num_items is None else num_items)
    return total


def _total_nll(model: nn.Module, batch: Batch, head: Head | None, backend: str) -> Tensor:
    return token_nll(model, batch, head=head, backend=backend).sum()


def _gradients(
    model: nn.Module, loss_of: Callable[[], Tensor], leaves: list[Tensor]
) -> Sequence[Tensor | None]:
    loss = loss_of()
    if not loss.requires_grad:  # none of them is read (experts of other tokens, say)
        return [None] * len(leaves)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    # To be added to in place: each in memory of its own.
    uses = Counter(_storage(g) for g in gradients if g is not None)
    return [
        g
        if g is None or (g.is_contiguous() and uses[_storage(g)] == 1)
        else g.clone(memory_format=torch.contiguous_format)
        for g in gradients
    ]


def _storage(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


@contextmanager
def _graph_from(model: nn.Module, leaves: list[Tensor]) -> Iterator[None]:
    """The model builds a graph for ``leaves`` alone, so none before the first that reads one."""
    wanted = set(leaves)
    others = [p for p in model.parameters() if p.requires_grad and p not in wanted]
    embeddings = causal_lm(model).get_input_embeddings()
    # PEFT makes the embeddings' output require a gradient for reentrant checkpoints, which are
    # not used here (see probing).
    hook = None
    if wanted.isdisjoint(embeddings.parameters()):
        hook = embeddings.register_forward_hook(lambda module, args, out: out.detach())
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_()
        if hook is not None:
            hook.remove()
