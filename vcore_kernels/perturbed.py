"""Moves parameters in place, ``theta <- theta - epsilon * g``, and back again, bit for bit."""

import math
import sys
import threading
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vcore_kernels._library import define
from vcore_kernels.backends import reference_perturb as reference
from vcore_kernels.backends import resolve, triton
from vcore_kernels.spans import span, spanned

Rounding = Literal["nearest", "stochastic"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALIGNMENT = 64  # bytes


class StalledPerturbationWarning(UserWarning):
    """The step was too small for the parameters' dtype: most entries did not move."""


class NonFiniteDirectionError(ValueError):
    """The direction holds NaN or infinity; the parameters are as they were."""


@dataclass(eq=False)
class Perturbation:
    """Parameters that :func:`perturb_` has moved, and what :func:`restore_` needs to put them back.

    Dropping it without a :func:`restore_` leaves the parameters where they are and releases the
    rest.
    """

    params: list[Tensor]  # each storage once, empty tensors left out
    backend: str
    extents: "list[_Extent]"  # the memory that is not what it was
    stalled: float = 0.0  # share of the entries with a nonzero direction that did not move
    active: bool = True
    saved: list[Tensor] = field(default_factory=list)  # the old bits of each parameter
    buffers: list[Tensor] = field(default_factory=list)  # `saved` are views of; used again
    addresses: list[int] = field(init=False)

    def __post_init__(self):
        self.addresses = [param.data_ptr() for param in self.params]

    def keep_only(self, moved: list[bool]) -> None:
        """Forgets the parameters that have not moved, which have nothing saved."""
        self.params = [p for p, yes in zip(self.params, moved, strict=True) if yes]
        self.addresses = [a for a, yes in zip(self.addresses, moved, strict=True) if yes]
        # Without a backup buffer yet, nothing moved.
        self.saved = [s for s, yes in zip(self.saved, moved, strict=False) if yes]


# ---- operators ----


def _fake_nothing(*_) -> None:
    return None


# `counts` int64 [tensors, 3], filled with -1: for each tensor that has moved, how many entries of
# the direction are not zero, how many of theta moved, and a number that is zero where the direction
# is finite; -1 stays where nothing has moved. It is the caller's, so that whoever is interrupted on
# the way out of the operator (Ctrl-C) still sees what has moved.
#
# On GPUs an operator moves the tensors that are on the device of `counts`: one call for each
# device. It only enqueues, and can be captured in a CUDA graph. The kernel that fills a row of
# `counts` is the one that saves and moves the tensor, so that whoever reads the row has waited for
# both.
define(
    "perturb_(Tensor(a!)[] params, Tensor[] direction, Tensor(b!)[] saved, float epsilon,"
    " int? seed, Tensor(c!) counts) -> ()",
    _fake_nothing,
)
define(
    "perturb_swap_(Tensor(a!)[] params, Tensor(b!)[] direction, float epsilon, int? seed,"
    " Tensor(c!) counts) -> ()",
    _fake_nothing,
)
define("restore_(Tensor(a!)[] params, Tensor[] saved) -> ()", _fake_nothing)
triton.implement("perturb", "perturb_", "perturb_swap_", "restore_")


def _kernels(backend: str) -> Any:
    """What has the three operators of a backend, by their names."""
    if backend == "triton":  # in the operators the compiled CUDA library comes before Triton
        return import_module("vcore_kernels.triton.perturb")
    return reference if backend == "reference" else torch.ops.vcore_kernels


# ---- public functions ----


@spanned
@torch.no_grad()
def perturb_(
    params: Iterable[Tensor],
    direction: Iterable[Tensor],
    epsilon: float,
    *,
    rounding: Rounding = "nearest",
    consume_direction: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Perturbation:
    """Moves each parameter in place, ``theta <- theta - epsilon * g``, until :func:`restore_`.

    The product and the difference are formed in fp32 (float64 for float64 parameters) and rounded
    once to the parameter's dtype. Tied parameters move once. Of DTensors each rank moves its own
    shard. The arguments, errors and warnings are
    those of :func:`perturbed`, which is this and :func:`restore_` as a context manager.
    """
    made: list[Perturbation] = []
    _perturb(made, params, direction, epsilon, rounding, consume_direction, generator, backend)
    return made[0]


def _perturb(
    made: list[Perturbation],
    params: Iterable[Tensor],
    direction: Iterable[Tensor],
    epsilon: float,
    rounding: Rounding,
    consume_direction: bool,
    generator: torch.Generator | None,
    backend: str,
) -> None:
    """Puts the perturbation into ``made`` before anything moves, so that no interrupt loses it."""
    params, direction = map(_local, params), map(_local, direction)
    plan = _plan(list(params), list(direction), epsilon, rounding, consume_direction)
    if not plan.params:
        made.append(Perturbation([], "reference", []))
        return
    seed = _draw_seed(generator) if rounding == "stochastic" else None
    chosen = resolve("perturb_", backend, *plan.params, *plan.direction)

    held = [extent for extent in plan.extents if extent.written]
    perturbation = Perturbation(plan.params, chosen, held)
    counts = _Counts(plan.params, chosen)
    _begin(perturbation, plan.extents)
    try:
        made.append(perturbation)
        if consume_direction:
            perturbation.saved = plan.direction
        else:
            perturbation.saved, perturbation.buffers = _take_backup(plan.params)
        _move(perturbation, plan.direction, epsilon, seed, counts)
        _bump_versions([*plan.params, *(plan.direction if consume_direction else [])])
        _check_counts(perturbation, counts.read(), rounding)
    except BaseException:  # Ctrl-C included
        perturbation.keep_only((counts.read()[:, 0] != _NOT_MOVED).tolist())
        restore_(perturbation)
        raise


def _local(tensor: Tensor) -> Tensor:
    """The shard of a DTensor that is here, in its own storage; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


_NOT_MOVED = -1  # in `counts`


class _Counts:
    """The operators' `counts`, one tensor for each device."""

    def __init__(self, params: Sequence[Tensor], backend: str):
        devices = (
            {torch.device("cpu"): 0} if backend == "reference" else {p.device: 0 for p in params}
        )
        self.by_device = [
            torch.full((len(params), 3), _NOT_MOVED, device=device) for device in devices
        ]

    def read(self) -> Tensor:
        """All of it, on the CPU. Waits for GPUs: the one synchronisation of a move."""
        return torch.stack([counts.cpu() for counts in self.by_device]).amax(0)


def _move(
    perturbation: Perturbation,
    direction: list[Tensor],
    epsilon: float,
    seed: int | None,
    counts: _Counts,
) -> None:
    params, saved = perturbation.params, perturbation.saved
    kernels = _kernels(perturbation.backend)
    for on_device in counts.by_device:
        if saved is direction:
            kernels.perturb_swap_(params, direction, epsilon, seed, on_device)
        else:
            kernels.perturb_(params, direction, saved, epsilon, seed, on_device)


@spanned
@torch.no_grad()
def restore_(perturbation: Perturbation) -> None:
    """Puts the parameters of a :func:`perturb_` back, bit for bit.

    NaN payloads and the signs of zeros included.

    Raises RuntimeError if they were put back before, or if a parameter's ``data`` was replaced in
    between (the others are put back).
    """
    if not perturbation.active:
        raise RuntimeError("restore_: these parameters have been restored already.")
    moved = [
        number
        for number, (param, address) in enumerate(
            zip(perturbation.params, perturbation.addresses, strict=True)
        )
        if param.data_ptr() != address
    ]
    params = [param for n, param in enumerate(perturbation.params) if n not in moved]
    saved = [keep for n, keep in enumerate(perturbation.saved) if n not in moved]
    if params:
        _kernels(perturbation.backend).restore_(params, saved)
        _bump_versions(params)
    _end(perturbation)
    if moved:
        raise RuntimeError(
            f"restore_: the storage of parameters {moved} was replaced while they were perturbed. "
            "Do not assign to .data or move the model to another device inside perturbed(...)."
        )


@contextmanager
def perturbed(
    params: Iterable[Tensor],
    direction: Iterable[Tensor],
    epsilon: float,
    *,
    rounding: Rounding = "nearest",
    consume_direction: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Iterator[Perturbation]:
    """A ``with`` block inside which the parameters stand at ``theta - epsilon * g``.

    After it they stand, bit for bit, where they were, whatever ends the block, an exception
    included. This is the parameter move of a finite-difference probe (VCORE, arXiv 2510.27462: the
    utility of token t is (l_t(theta) - l_t(theta - epsilon * g)) / epsilon), without a copy of the
    model and without a pass over the host.

    **Rounding.** A step below half a unit in the last place leaves an entry where it is: a bf16
    weight of 0.02 moves in steps of 1.2e-4, so with ``epsilon * g`` of 1e-6 a bf16 model does not
    move *at all* with ``rounding="nearest"``, and the probe measures nothing. Where that befalls
    most entries, :class:`StalledPerturbationWarning` says so. ``rounding="stochastic"`` moves each
    entry with a probability that makes the expected step exact; the noise of that is the price.
    Choose epsilon by the dtype.

    **Memory.** By default the direction survives and the old values go to one backup buffer (as
    large as the parameters), which is kept and used again by the next call;
    :func:`free_backup_buffers` releases it. With ``consume_direction=True`` the old values are
    swapped into the direction's own storage and no memory is needed: do not touch the direction
    inside the block; after it, its content is gone (it holds the parameters).

    Args:
        params: tensors of any shapes, float32, bfloat16, float16 or float64, each dense in memory
            (a view with gaps is refused). A tensor that appears twice (tied weights) moves once,
            and needs the same direction twice.
        direction: g, one tensor for each parameter, of its shape and device, of any of these
            dtypes. With ``consume_direction`` also of its dtype and strides, and overlapping
            nothing else.
        epsilon: step size, positive, in the units of theta / g. For theta + epsilon * g negate g in
            place.
        rounding: "nearest" (ties to even) or "stochastic" (not for float64).
        generator: source of the one seed that stochastic rounding draws (None: the CPU's default
            generator). The result depends on that seed alone, not on the number of threads or the
            backend.
        backend: "auto", "cpp", "cuda", "triton" or "reference"; all give the same bits (of NaN
            parameters, only that they are NaN).

    Yields:
        The :class:`Perturbation`, whose ``stalled`` is the share of the entries with a nonzero
        direction that rounding left where they were.

    Raises:
        ValueError, TypeError: arguments that do not fit together, named. Nothing has been touched.
        NonFiniteDirectionError: NaN or infinity in the direction, found in the same pass. The
            parameters are as they were; a direction to be consumed is gone.
        RuntimeError: one of the tensors is perturbed already. Disjoint sets of tensors do nest.
    """
    made: list[Perturbation] = []
    try:
        with torch.no_grad(), span("perturb_"):
            _perturb(
                made, params, direction, epsilon, rounding, consume_direction, generator, backend
            )
        yield made[0]
    finally:
        if made and made[0].active:
            restore_(made[0])


def free_backup_buffers() -> None:
    """Releases the backup buffers that :func:`perturbed` keeps for its next call."""
    with _lock:
        _free_buffers.clear()


# ---- checks ----


class _Plan(NamedTuple):
    params: list[Tensor]
    direction: list[Tensor]
    extents: "list[_Extent]"


class _Extent(NamedTuple):
    """The bytes [start, end) of a tensor's storage that a call reads or writes."""

    device: int  # Tensor.get_device(): -1 for a CPU
    start: int
    end: int
    written: bool
    name: str


def _plan(params, direction, epsilon, rounding, consume_direction) -> _Plan:
    """Checks the arguments; each nonempty storage once, directions in their parameter's strides."""
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    if not (math.isfinite(epsilon) and smallest <= epsilon <= largest):
        raise ValueError(
            "perturbed: epsilon must be positive, finite and within the range of float32, got "
            f"{epsilon}."
        )
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(
            f"perturbed: rounding must be 'nearest' or 'stochastic', got {rounding!r}."
        )
    if len(params) != len(direction):
        raise ValueError(
            f"perturbed: {len(params)} params but {len(direction)} tensors in direction. Pass one "
            "for each, in the same order."
        )
    first: dict[tuple, int] = {}
    chosen_params: list[Tensor] = []
    chosen_direction: list[Tensor] = []
    extents: list[_Extent] = []
    for number, (param, g) in enumerate(zip(params, direction, strict=True)):
        _check_pair(number, param, g, rounding, consume_direction)
        if param.numel() == 0:
            continue
        place = (param.get_device(), param.data_ptr(), param.dtype, param.shape, param.stride())
        if place in first:
            twin = first[place]
            if g is not direction[twin] and not _equal(g, direction[twin]):
                raise ValueError(
                    f"perturbed: params[{twin}] and params[{number}] are tied (the same memory), "
                    "but their directions differ. Pass the parameter once, with the sum of both."
                )
            continue
        first[place] = number
        if _same_layout(param, g):
            g = g.as_strided(param.shape, param.stride())
        else:
            g = torch.empty_like(param, dtype=g.dtype, memory_format=torch.preserve_format).copy_(g)
        chosen_params.append(param)
        chosen_direction.append(g)
        extents.append(_extent(param, True, f"params[{number}]"))
        extents.append(_extent(g, consume_direction, f"direction[{number}]"))
    if shared := _overlap(extents):
        raise ValueError(
            f"perturbed: {shared[0]} and {shared[1]} share part of their memory. Pass whole "
            "tensors, tied ones as they are, and a direction with memory of its own."
        )
    return _Plan(chosen_params, chosen_direction, extents)


def _check_pair(number, param, g, rounding, consume_direction) -> None:
    for name, tensor in (("params", param), ("direction", g)):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"perturbed: {name}[{number}] is {type(tensor).__name__}, expected a tensor. "
                "Leave parameters without a gradient out of both lists."
            )
        if (
            tensor.dtype not in _DTYPES
            or tensor.layout != torch.strided
            or is_traceable_wrapper_subclass(tensor)
        ):
            raise TypeError(
                f"perturbed: {name}[{number}] is a {type(tensor).__name__} of {tensor.dtype} "
                f"({tensor.layout}), expected a plain dense tensor of float32, bfloat16, float16 "
                "or float64. Of a quantised model pass the adapters' parameters only."
            )
    if param.shape != g.shape:
        raise ValueError(
            f"perturbed: direction[{number}] has shape {list(g.shape)}, params[{number}] has "
            f"{list(param.shape)}."
        )
    if param.device != g.device:
        raise ValueError(
            f"perturbed: direction[{number}] is on {g.device}, params[{number}] on {param.device}."
        )
    if rounding == "stochastic" and param.dtype == torch.float64:
        raise TypeError(
            f"perturbed: params[{number}] is float64, which rounding='stochastic' does not serve: "
            "there is no wider type to round from. Use rounding='nearest'."
        )
    if not (param.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(param)):
        raise ValueError(
            f"perturbed: params[{number}] (shape {list(param.shape)}, strides "
            f"{list(param.stride())}) is a view with gaps or overlaps. Pass the tensor it is a "
            "view of."
        )
    if consume_direction and (g.dtype != param.dtype or not _same_layout(param, g)):
        raise ValueError(
            f"perturbed: consume_direction=True swaps values, so direction[{number}] must have "
            f"the dtype and strides of params[{number}] ({param.dtype}, {list(param.stride())}), "
            f"got {g.dtype}, {list(g.stride())}. Convert it, or leave consume_direction off."
        )


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie alike in memory; a dimension of size 1 has no stride."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(size < 2 or own == other for size, own, other in strides)


def _equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal, with NaN equal to NaN."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _extent(tensor: Tensor, written: bool, name: str) -> _Extent:
    start = tensor.data_ptr()
    return _Extent(tensor.get_device(), start, start + tensor.nbytes, written, name)


def _overlap(extents: Iterable[_Extent]) -> tuple[str, str] | None:
    """The names of two extents that share bytes, one of them written; None where there are none."""
    widest: dict[tuple[int, bool], _Extent] = {}  # by device, and whether written
    for extent in sorted(extents):
        for written in (True, False):
            other = widest.get((extent.device, written))
            if other and extent.start < other.end and (extent.written or written):
                return other.name, extent.name
        other = widest.get((extent.device, extent.written))
        if other is None or extent.end > other.end:
            widest[extent.device, extent.written] = extent
    return None


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _bump_versions(tensors: Sequence[Tensor]) -> None:
    """Lets autograd see the write: a backward pass over what has moved since must raise."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _check_counts(perturbation: Perturbation, counts: Tensor, rounding: Rounding) -> None:
    nonfinite = counts[:, 2].nonzero().flatten().tolist()
    if nonfinite:
        raise NonFiniteDirectionError(
            f"perturbed: the direction of {len(nonfinite)} of {len(counts)} parameters holds NaN "
            "or infinity, the first of them of shape "
            f"{list(perturbation.params[nonfinite[0]].shape)}. The parameters are unchanged."
        )
    nonzero, moved, _ = counts.sum(0).tolist()
    perturbation.stalled = max(0.0, 1 - moved / nonzero) if nonzero else 0.0
    if rounding == "nearest" and perturbation.stalled > 0.5:
        warnings.warn(
            f"perturbed: {perturbation.stalled:.0%} of the entries did not move: the step is "
            "below half a unit in the last place of the parameters. Use a larger epsilon, "
            "rounding='stochastic', or float32 parameters.",
            StalledPerturbationWarning,
            stacklevel=_level_outside(),
        )


def _level_outside() -> int:
    """The stacklevel at which warnings.warn names the caller of this module's public functions."""
    inside = (__name__, "contextlib", "torch.utils._contextlib", "vcore_kernels.spans")
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__") in inside:
        frame, level = frame.f_back, level + 1
    return level


# ---- what is perturbed now, and the buffers ----

_lock = threading.Lock()
_perturbed_now: "weakref.WeakSet[Perturbation]" = weakref.WeakSet()
_free_buffers: dict["_Queue", Tensor] = {}
_Queue = tuple[
    torch.device, int
]  # a device and a stream of it: the order in which buffers are used


def _current_queue(device: torch.device) -> _Queue:
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _begin(perturbation: Perturbation, extents: Sequence[_Extent]) -> None:
    """Enters the perturbation among those under way, unless one of these holds the same memory."""
    with _lock:
        under_way = [extent for other in _perturbed_now for extent in other.extents]
        if under_way and (shared := _overlap([*extents, *under_way])):
            raise RuntimeError(
                f"perturbed: {shared[0]} is perturbed already. Restore it first; only disjoint "
                "sets of tensors nest."
            )
        _perturbed_now.add(perturbation)


def _end(perturbation: Perturbation) -> None:
    """Takes the perturbation off the list and keeps its buffers for the next one on its stream."""
    perturbation.active = False
    with _lock:
        _perturbed_now.discard(perturbation)
        for buffer in perturbation.buffers:
            queue = _current_queue(buffer.device)
            if buffer.is_cuda:  # it may have been made on another stream
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
            kept = _free_buffers.get(queue)
            if kept is None or kept.numel() < buffer.numel():
                _free_buffers[queue] = buffer
    perturbation.saved, perturbation.buffers = [], []


def _take_backup(params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Room for the bits of each parameter: views of one buffer a device, and these buffers."""
    room: dict[int, Tensor] = {}
    buffers = []
    for device in dict.fromkeys(param.device for param in params):
        numbers = [n for n, param in enumerate(params) if param.device == device]
        sizes = [-(-params[n].nbytes // _ALIGNMENT) * _ALIGNMENT for n in numbers]
        with _lock:
            buffer = _free_buffers.pop(_current_queue(device), None)
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = None  # released before the larger one is allocated
            with torch.inference_mode(False):
                buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        room.update(zip(numbers, buffer[: sum(sizes)].split(sizes), strict=True))
        buffers.append(buffer)
    return [room[n] for n in range(len(params))], buffers
