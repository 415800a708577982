"""The linear head whose vocabulary is sharded over processes: tensor parallelism along V.

Each process r of a group holds some rows of the weight, [V_r, H], and all hold the same hidden
states and targets. The operators run on the shard, and only vectors of N numbers go round, in
float64. One all-reduce finds the largest logit M. One sums exp(o_r - M), o_r the log-sum-exp of the
shard's logits *without* the target's; z_target - M, from the process that has the target; and where
tangents are asked for exp(o_r - M) * (mean of dz over these logits) and the target's dz. Then, as
in one process,

    a = log(sum of exp(o_r - M)) - (z_target - M),  nll = log(1 + exp(a)),
    tangent = (1 - p_target) * (mean of dz over the others - dz_target),

which keep their relative accuracy where the target's probability nears 1. In backward d_weight
and d_bias are local, and d_hidden is summed over the group.

The operators want a target in every row. Where the label lives in another shard they get a
*stand-in*, one entry of this shard for all such rows, and what they do to it is undone: forward by
counting it among the others, backward by telling them that its probability is 1, so that its
logit's gradient is 0, and adding the true one.

This is the only module of the kernel library that communicates.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vcore_kernels import _head_ops  # noqa: F401  (declares the operators)
from vcore_kernels._head import (
    HeadOptions,
    HeadRows,
    head_rows,
    to_labels,
    without_second_derivative,
)
from vcore_kernels._two_points import Second, second_rows
from vcore_kernels.backends import reference, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.vcore_kernels
_IGNORED = -100  # of the operators below: the caller's ignore_index may be an entry of the shard
_guard = partial(
    without_second_derivative,
    "linear_nll",
    mend="Gather the weight (weight.full_tensor()) and pass backend='reference'.",
)


# --------------------------------------------------------------------------------------- the shard


class VocabularyShard(NamedTuple):
    """Which rows of the head this process has: ``start`` and the following, of ``vocabulary``."""

    group: "ProcessGroup"
    start: int | Tensor
    vocabulary: int | Tensor


def localize(
    op: str,
    group: "ProcessGroup | None",
    weight: Any,
    bias: Any,
    **replicated: Tensor,
) -> tuple[Any, ...]:
    """(shard, weight, bias, *replicated) as plain tensors of this process.

    ``shard`` is None where the weight is not sharded. With ``group`` the weight is this process's
    shard, of any size, in the order of the group's ranks: one all-reduce of a number for each. A
    DTensor's layout says where its shard is.
    """
    tensors = (weight, bias, *replicated.values())
    if group is None and not any(_is_dtensor(x) for x in tensors):
        return None, weight, bias, *replicated.values()
    others = [_local_replica(op, name, x) for name, x in replicated.items()]
    if group is not None:
        if _is_dtensor(weight) or _is_dtensor(bias):
            raise ValueError(
                f"{op}: group was given with a DTensor, whose mesh says where its shards are. Pass "
                "the DTensor without group, or weight.to_local() with it."
            )
        return _shard_in_group(op, group, weight), weight, bias, *others
    dim = _sharded_mesh_dim(op, "weight", weight) if _is_dtensor(weight) else None
    if dim is None:
        weight = weight.to_local() if _is_dtensor(weight) else weight
        bias = None if bias is None else _local_replica(op, "bias", bias)
        return None, weight, bias, *others
    if bias is not None and (not _is_dtensor(bias) or _layout(bias) != _layout(weight)):
        raise ValueError(
            f"{op}: weight is sharded over processes as {_layout(weight)}, bias is "
            f"{_layout(bias) if _is_dtensor(bias) else 'a plain tensor'}. Distribute bias like "
            "weight."
        )
    shard = _shard_of_dtensor(op, weight, dim)
    return shard, weight.to_local(), None if bias is None else bias.to_local(), *others


def local_tangent(op: str, name: str, tangent: Any, primal: Any) -> Tensor | None:
    """The tangent of this process's shard of ``primal``, both as they were passed."""
    if tangent is None or primal is None:
        return tangent
    if _is_dtensor(tangent) != _is_dtensor(primal) or (
        _is_dtensor(tangent) and _layout(tangent) != _layout(primal)
    ):
        layouts = [_layout(x) if _is_dtensor(x) else "a plain tensor" for x in (tangent, primal)]
        raise ValueError(
            f"{op}: {name}_tangent is {layouts[0]}, {name} {layouts[1]}. Distribute the tangent as "
            f"{name} is."
        )
    return tangent.to_local() if _is_dtensor(tangent) else tangent


def refuse_dtensors(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if _is_dtensor(tensor):
            raise TypeError(
                f"{op}: {name} is a DTensor, which this function does not take. Pass "
                f"{name}.full_tensor(), or use linear_nll_jvp, which takes a sharded head."
            )


def _is_dtensor(x: Any) -> bool:
    # without importing torch.distributed.tensor, which takes half a second
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")


def _layout(x: Any) -> str:
    return f"{tuple(x.placements)} on {x.device_mesh}"


def _local_replica(op: str, name: str, x: Any) -> Tensor:
    if not _is_dtensor(x):
        return x
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{op}: {name} is a DTensor placed as {tuple(x.placements)}, expected Replicate: all "
            f"processes of a vocabulary-parallel head have the same rows. Redistribute {name}."
        )
    return x.to_local()


def _sharded_mesh_dim(op: str, name: str, x: Any) -> int | None:
    """The dimension of the mesh over which the rows of ``x`` are sharded; None if replicated."""
    from torch.distributed.tensor import Shard

    sharded = [i for i, placement in enumerate(x.placements) if not placement.is_replicate()]
    if not sharded:
        return None
    # strided shards, which interleave rows, are not equal to Shard(0)
    if len(sharded) > 1 or x.placements[sharded[0]] != Shard(0):
        raise ValueError(
            f"{op}: {name} is a DTensor placed as {tuple(x.placements)}, expected Shard(0), along "
            "the vocabulary, over one dimension of its mesh and Replicate over the others. "
            f"Redistribute {name}, or pass {name}.full_tensor()."
        )
    return sharded[0]


def _shard_of_dtensor(op: str, weight: Any, dim: int) -> VocabularyShard:
    mesh, vocabulary = weight.device_mesh, weight.shape[0]
    rank = mesh.get_local_rank(dim)
    size = math.ceil(vocabulary / mesh.size(dim))  # DTensor shards like torch.chunk
    start = min(rank * size, vocabulary)
    found, expected = weight.to_local().shape[0], min(size, vocabulary - start)
    if found != expected:
        raise ValueError(
            f"{op}: the shard of weight on rank {rank} has {found} rows; a DTensor of "
            f"{vocabulary} rows has {expected} there. Pass weight.to_local() and group for shards "
            "of other sizes."
        )
    return VocabularyShard(mesh.get_group(dim), start, vocabulary)


def _shard_in_group(op: str, group: "ProcessGroup", weight: Tensor) -> VocabularyShard:
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: this process is not in group. Call it on the group's ranks alone.")
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    sizes[rank] = weight.shape[0]
    dist.all_reduce(sizes, group=group)
    if weight.device.type == "cpu":
        numbers = sizes.tolist()
        return VocabularyShard(group, sum(numbers[:rank]), sum(numbers))
    return VocabularyShard(group, sizes[:rank].sum(), sizes.sum())  # no wait for the device


# ---------------------------------------------------------------------------- the shard's own part


@dataclass(frozen=True)
class _Head:
    """What is the same for all rows of a call."""

    group: "ProcessGroup"
    backend: str
    softcap: float | None
    scale: float

    def slope(self, logit: Tensor) -> Tensor | float:
        """d logit / d (hidden @ weight.T + bias)."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logit / self.softcap) ** 2)

    def raw(self) -> tuple[float, float, int]:
        return self.softcap or 0.0, self.scale, _IGNORED


class _Targets(NamedTuple):
    local: Tensor  # [N] int64: entry of the shard, the label or the stand-in, or _IGNORED
    mine: Tensor  # [N] bool: the label lives here
    stand_in: Tensor  # [1] int64

    @property
    def rows(self) -> Tensor:
        return self.local.clamp(min=0)


def _local_targets(rows: HeadRows, shard: VocabularyShard, ignore_index: int) -> _Targets:
    size = rows.weight.shape[0]
    supervised = rows.target != ignore_index
    index = rows.target - shard.start
    mine = supervised & (index >= 0) & (index < size)
    if rows.bias is None or size == 0:
        stand_in = index.new_zeros(1)
    else:  # not one that a bias of -inf masks, unless all are
        stand_in = rows.bias.detach().argmax().reshape(1)
    local = index.where(mine, stand_in).where(supervised, _IGNORED)
    return _Targets(local, mine, stand_in)


class _Statistics(NamedTuple):
    """Of this shard, [N] in float64. Logits are told apart from the largest, so that none of their
    size is lost to rounding."""

    top: Tensor  # about the largest logit; -inf where there is none
    others: Tensor  # log-sum-exp of the logits but for a label that lives here, less top
    at_local: Tensor  # logit at ``targets.local``, less top
    mean: Tensor | None = None  # softmax mean of dz over the logits of ``others``
    d_at_local: Tensor | None = None  # dz at ``targets.local``


def _of_empty_shard(hidden: Tensor, tangents: bool) -> _Statistics:
    zeros = hidden.new_zeros(hidden.shape[0], dtype=torch.float64)
    none = _Statistics(zeros - torch.inf, zeros, zeros)
    return none._replace(mean=zeros, d_at_local=zeros) if tangents else none


def _statistics(head, hidden, weight, bias, targets, keep_rows) -> tuple[_Statistics, Tensor]:
    """And the gradients of the shard's own losses [N, H], if kept."""
    if weight.shape[0] == 0:
        rows = torch.zeros_like(hidden) if keep_rows else hidden.new_empty(0)
        return _of_empty_shard(hidden, tangents=False), rows
    if head.backend == "reference":
        logits = reference.head_logits(hidden, weight, bias, head.softcap, head.scale)
        top, p, at_local = _exponentials(logits, targets)
        return _Statistics(top, p.sum(1).double().log(), at_local), hidden.new_empty(0)
    nll, (top, rest), rows = _ops.linear_nll_forward(
        hidden, weight, targets.local, bias, *head.raw(), keep_rows
    )
    nll, top, rest = nll.double(), top.double(), rest.double()
    others = rest + torch.log(-torch.expm1(-nll)).where(targets.mine, 0)
    some = top != -torch.inf
    return _Statistics(top, others.where(some, 0), (rest - nll).where(some, 0)), rows


def _exponentials(logits: Tensor, targets: _Targets) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit [N], exp(logit - largest) [N, V_r] but 0 at labels that live here, and
    the logit at ``targets.local`` less the largest [N]."""
    top = logits.amax(1, keepdim=True)
    logits = logits - top.where(top != -torch.inf, 0)
    index = targets.rows.unsqueeze(1)
    at_local = logits.gather(1, index)
    others = logits.scatter(1, index, at_local.where(~targets.mine.unsqueeze(1), -torch.inf))
    return top.squeeze(1).double(), others.exp(), at_local.squeeze(1).double()


def _statistics_jvp(head, hidden, weight, bias, targets, d_hidden, d_weight, d_bias) -> _Statistics:
    if weight.shape[0] == 0:
        return _of_empty_shard(hidden, tangents=True)
    if head.backend == "reference":
        logits, d_logits = _dual_logits(head, hidden, weight, bias, d_hidden, d_weight, d_bias)
        top, p, at_local = _exponentials(logits, targets)
        total = p.sum(1).double()
        mean = (p * d_logits).sum(1) / total.where(total != 0, 1)
        d_at_local = d_logits.gather(1, targets.rows.unsqueeze(1)).squeeze(1)
        return _Statistics(top, total.log(), at_local, mean, d_at_local.double())
    nll, tangent = _ops.linear_nll_jvp(
        hidden, weight, targets.local, d_hidden, d_weight, bias, d_bias, *head.raw()
    )
    nll, tangent = nll.double(), tangent.double()
    z, dz = _logits_at(head, hidden, weight, bias, targets.rows, d_hidden, d_weight, d_bias)
    other_than_target = -torch.expm1(-nll)
    others = torch.log(other_than_target).where(targets.mine, 0)
    mean = torch.where(targets.mine & (nll != 0), tangent / other_than_target, tangent) + dz
    some = targets.mine | (z != -torch.inf)  # a stand-in is -inf where the whole shard is
    top = (z + nll).where(some, -torch.inf)
    return _Statistics(top, others, (-nll).where(some, 0), mean, dz)


def _dual_logits(head, hidden, weight, bias, d_hidden, d_weight, d_bias) -> tuple[Tensor, Tensor]:
    logits = reference.head_logits(hidden, weight, bias, head.softcap, head.scale)
    d_logits = reference.head_logits(d_hidden, weight, d_bias, None, 1.0)
    if d_weight is not None:
        d_logits = d_logits + reference.head_logits(hidden, d_weight, None, None, 1.0)
    return logits, d_logits * head.slope(logits)


def _logits_at(head, hidden, weight, bias, index, d_hidden, d_weight, d_bias):
    """Logit [N] of entry ``index[n]`` of the shard in row n, and its tangent."""
    acc = reference.statistics_dtype(hidden.dtype)

    def product(rows, matrix):
        return (rows.to(acc) * matrix.index_select(0, index).to(acc)).sum(1)

    z, dz = product(hidden, weight), product(d_hidden, weight)
    if d_weight is not None:
        dz = dz + product(hidden, d_weight)
    if bias is not None:
        z = z + bias.to(acc)[index]
    if d_bias is not None:
        dz = dz + d_bias.to(acc)[index]
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z.double(), (dz * head.slope(z)).double()


# ---------------------------------------------------------------------------------- over the group


class _Losses(NamedTuple):
    """Of the whole vocabulary, [N] in float64."""

    nll: Tensor
    top: Tensor  # the log-sum-exp of all logits is top + rest
    rest: Tensor
    log_share: Tensor  # log of this shard's part in the sum over all others than the target
    log_p: Tensor  # log-probability at this shard's ``targets.local``
    tangent: Tensor


def _combine(head: _Head, targets: _Targets, shard: _Statistics) -> _Losses:
    """Two all-reduces over the group: [N], and [3, N] or with tangents [5, N].

    One of the sums is of no use but to see that every process has the same targets: each
    supervised row's label must live in one shard.
    """
    top = shard.top.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=head.group)
    top = top.where(top != -torch.inf, 0)
    others = (shard.top - top) + shard.others
    at_local = (shard.top - top) + shard.at_local
    share = others.exp()
    terms = [targets.mine.to(share), share, at_local.where(targets.mine, 0)]
    if shard.mean is not None and shard.d_at_local is not None:
        terms += [
            (share * shard.mean).where(share != 0, 0),
            shard.d_at_local.where(targets.mine, 0),
        ]
    sums = torch.stack(terms)
    dist.all_reduce(sums, group=head.group)
    owners, total, at_target, *moments = sums
    supervised, some = targets.local != _IGNORED, total != 0
    _check_same_targets((owners == supervised).all())
    gap = total.log() - at_target
    nll = torch.logaddexp(gap, torch.zeros_like(gap)).where(supervised, 0)
    rest = torch.logaddexp(total.log(), at_target)
    tangent = torch.zeros_like(nll)
    if moments:
        tangent = -torch.expm1(-nll) * (moments[0] / total - moments[1])
        tangent = tangent.where(supervised & some, 0)
    log_share = (others - total.log()).where(some, 0)
    return _Losses(nll, top, rest, log_share, at_local - rest, tangent)


def _check_same_targets(same: Tensor) -> None:
    """On an accelerator asynchronously, so as not to wait for it."""
    if same.device.type != "cpu":
        torch._assert_async(same)
    elif not same:
        raise ValueError(
            "a vocabulary-parallel head: the processes of the group have different targets. They "
            "share one batch, of which each computes a part of the vocabulary. If the weight is "
            "sharded by FSDP, whose ranks have batches of their own, compute the loss in its "
            "forward, where the weight is whole."
        )


# ------------------------------------------------------------------------------------- derivatives


class _VocabParallelNll(torch.autograd.Function):
    """nll, and what backward needs of it: the log-sum-exp in two parts, log_share, log-probability
    and logit at the local target, and with ``keep_rows`` the gradients of the shard's own losses.
    """

    @staticmethod
    def forward(hidden, weight, bias, local, mine, stand_in, head, keep_rows):
        targets = _Targets(local, mine, stand_in)
        shard, rows = _statistics(head, hidden, weight, bias, targets, keep_rows)
        nll, top, rest, log_share, log_p, _ = _combine(head, targets, shard)
        nll = nll.to(reference.statistics_dtype(hidden.dtype))
        return nll, top, rest, log_share, log_p, shard.top + shard.at_local, rows

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.head, ctx.keep_rows = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad_nll, *_):
        if grad_nll is None:
            return (None,) * 8
        hidden, weight, bias, local, mine, stand_in, *known = ctx.saved_tensors
        nll, top, rest, log_share, log_p, logit, rows = known
        head, targets = ctx.head, _Targets(local, mine, stand_in)
        d_hidden, d_weight, d_bias = None, None, None
        with torch.no_grad():
            if ctx.keep_rows:
                d_hidden = _gradient_of_kept(
                    head, weight, targets, grad_nll, nll, log_share, logit, rows
                )
            else:
                acc = reference.statistics_dtype(hidden.dtype)
                lse = torch.stack([top.to(acc), (rest + (top - top.to(acc))).to(acc)])
                at_local = log_p.exp() * head.slope(logit)
                needs = ctx.needs_input_grad[:3]
                d_hidden, d_weight, d_bias = _gradients(
                    head, hidden, weight, bias, targets, grad_nll, nll, lse, at_local, needs
                )
            if d_hidden is not None:
                dist.all_reduce(d_hidden, group=head.group)
                d_hidden = d_hidden.to(hidden.dtype)
        inputs = (hidden, weight, bias, grad_nll)
        return *(_guard(grad, *inputs) for grad in (d_hidden, d_weight, d_bias)), *(None,) * 5

    @staticmethod
    def jvp(ctx, d_hidden, d_weight, d_bias, *_):
        hidden, weight, bias, *targets = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if d_hidden is None else d_hidden
        args = (ctx.head, hidden, weight, bias, _Targets(*targets), d_hidden, d_weight, d_bias)
        with torch.no_grad():
            tangent = _nll_and_tangent(*args)[1]
        return _guard(tangent, hidden, weight, bias), *(None,) * 6

    @staticmethod
    def vmap(*_):
        raise RuntimeError("linear_nll: no vmap rule for a weight sharded over processes.")


def _nll_and_tangent(head, hidden, weight, bias, targets, *tangents) -> tuple[Tensor, Tensor]:
    shard = _statistics_jvp(head, hidden, weight, bias, targets, *tangents)
    losses = _combine(head, targets, shard)
    statistics = reference.statistics_dtype(hidden.dtype)
    return losses.nll.to(statistics), losses.tangent.to(statistics)


def _scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """[N, H]: each row times its factor; by a factor of 0 it is 0, whatever it holds.

    In float32 or float64: partial gradients of the shards cancel, so they are rounded once, after
    the sum over the group.
    """
    acc = reference.statistics_dtype(rows.dtype)
    factor = factor.to(acc).unsqueeze(1)
    return (rows.to(acc) * factor).where(factor != 0, 0)


def _gradient_of_kept(head, weight, targets, grad_nll, nll, log_share, logit, rows) -> Tensor:
    """This shard's part of d_hidden, from the gradient of its own losses, sum_v p_v w_v - w_target.

    That shard's softmax counts by its part c of the probability, and the target's -w_target in
    full, where the shard has it.
    """
    grad = grad_nll.double()
    live = (grad != 0) & (targets.local != _IGNORED)
    others = -torch.expm1(-nll.double())  # 1 - p_target
    elsewhere = -torch.expm1(log_share) * others  # 1 - c, for the shard that has the target
    inside = torch.where(targets.mine, 1 - elsewhere, log_share.exp() * others)
    at_target = torch.where(targets.mine, -elsewhere, inside) * head.slope(logit)
    d_hidden = _scaled(rows, (grad * inside).where(live, 0))
    if weight.shape[0]:
        at_rows = weight.index_select(0, targets.rows)
        d_hidden += _scaled(at_rows, (grad * at_target).where(live, 0))
    return d_hidden


def _gradients(
    head, hidden, weight, bias, targets, grad_nll, nll, lse, at_local, needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """This shard's part of d_hidden in float32 or float64, and d_weight, d_bias.

    ``at_local`` [N] float64: derivative of the log-sum-exp at ``targets.local``.
    """
    need_hidden, need_weight, need_bias = needs
    acc = reference.statistics_dtype(hidden.dtype)
    supervised = targets.local != _IGNORED
    grad = grad_nll.to(acc).where(supervised, 0)
    if weight.shape[0] == 0:
        d_hidden, d_weight = torch.zeros_like(hidden, dtype=acc), torch.zeros_like(weight)
        d_bias = weight.new_zeros(0)
    elif head.backend == "reference":
        d_hidden, d_weight, d_bias = _reference_gradients(
            head, hidden, weight, bias, targets, grad, nll, lse
        )
    else:
        d_hidden, d_weight, d_bias = _ops.linear_nll_backward(
            grad,
            hidden,
            weight,
            targets.local,
            bias,
            nll.where(targets.mine, 0),  # the stand-in's logit gets a gradient of expm1(0) = 0
            lse,
            *head.raw(),
            *needs,
        )
        at_stand_in = (grad * at_local).where((grad != 0) & ~targets.mine, 0).to(acc)
        if need_hidden:
            row = weight.index_select(0, targets.stand_in).squeeze(0).to(acc)
            d_hidden = d_hidden.to(acc).addr(at_stand_in, row)
        if need_weight:
            _add_at(d_weight, targets.stand_in, _scaled(hidden, at_stand_in).sum(0))
        if need_bias:
            _add_at(d_bias, targets.stand_in, at_stand_in.sum())
    return (
        d_hidden.contiguous() if need_hidden else None,
        d_weight.to(weight.dtype) if need_weight else None,
        d_bias.to(bias.dtype) if need_bias else None,
    )


def _add_at(x: Tensor, index: Tensor, value: Tensor) -> None:
    """x[index] += value, added in the dtype of ``value``."""
    x.index_copy_(0, index, (x.index_select(0, index) + value).to(x.dtype))


def _reference_gradients(head, hidden, weight, bias, targets, grad, nll, lse):
    logits = reference.head_logits(hidden, weight, bias, head.softcap, head.scale)
    top, rest = lse.unsqueeze(2)
    d_logits = torch.exp(logits - top) * torch.exp(-rest)
    index = targets.rows.unsqueeze(1)
    at_target = torch.expm1(-nll).unsqueeze(1)
    at_local = at_target.where(targets.mine.unsqueeze(1), d_logits.gather(1, index))
    d_logits = d_logits.scatter(1, index, at_local) * head.slope(logits)
    d_logits = _scaled(d_logits, grad)
    live = _scaled(hidden, grad != 0)
    with reference.without_autocast(hidden.device.type):
        return d_logits @ weight.to(grad.dtype), d_logits.T @ live, d_logits.sum(0)


# -------------------------------------------------------------- what the public functions come to


@torch.compiler.disable
def linear_nll(
    op: str,
    shard: VocabularyShard,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    shift: int,
    backend: str,
    debug: bool,
) -> Tensor:
    """:func:`vcore_kernels.linear_nll` where the head is this process's shard."""
    rows = head_rows(
        op, hidden, weight, target, bias, options, shift, debug, vocabulary=shard.vocabulary
    )
    head = _head(shard, resolve(op, backend, *rows.tensors()), options)
    head_frozen = not rows.weight.requires_grad and not (
        rows.bias is not None and rows.bias.requires_grad
    )
    keep_rows = (
        torch.is_grad_enabled()
        and rows.hidden.requires_grad
        and head_frozen
        and head.backend != "reference"
    )
    targets = _local_targets(rows, shard, options.ignore_index)
    nll = _VocabParallelNll.apply(rows.hidden, rows.weight, rows.bias, *targets, head, keep_rows)[0]
    return to_labels(nll, target.shape, shift)


@torch.compiler.disable
@torch.no_grad()
def linear_nll_jvp(
    op: str,
    shard: VocabularyShard,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    second: Second,
    options: HeadOptions,
    shift: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`vcore_kernels.linear_nll_jvp` where the head is this process's shard."""
    rows = head_rows(
        op, hidden, weight, target, bias, options, shift, debug, vocabulary=shard.vocabulary
    )
    tangents = second_rows(op, rows, hidden, weight, bias, second)
    served = [tensor for tensor in tangents if tensor is not None]
    head = _head(shard, resolve(op, backend, *rows.tensors(), *served), options)
    targets = _local_targets(rows, shard, options.ignore_index)
    nll, tangent = _nll_and_tangent(head, rows.hidden, rows.weight, rows.bias, targets, *tangents)
    return to_labels(nll, target.shape, shift), to_labels(tangent, target.shape, shift)


def _head(shard: VocabularyShard, backend: str, options: HeadOptions) -> _Head:
    return _Head(shard.group, backend, options.softcap, float(options.scale))
