"""Long sequences over several processes: each holds a part of the tokens, attention sees them all.

Context parallelism by exchanging heads for tokens (Ulysses, arXiv 2309.14509). Every layer works
on the tokens that its process holds; around attention one all-to-all turns queries, keys and
values [B, heads, T / r, D] into [B, heads / r, T, D], where any attention implementation serves,
and another one turns the output back. Both have gradients and forward-mode derivatives, so that
directions, utilities and losses work on a part of a batch as they do on a whole one. A step::

    with context_parallel(model, group):
        part = shard_batch(batch, group)  # batch: the same on every process of the group
        g = descent_direction(model, shard_batch(probe, group), processes=Processes(group))
        utility, nll = token_utilities_and_nll(model, part, g)[:2]
        utility, nll = gather_tokens(batch, [utility, nll], group)  # like batch["labels"]
        mask = supervised_labels(batch) != -100
        weights = vcore_loss(nll, utility, mask=mask, kl_budget=0.02).weights
        loss = (split_tokens(weights, group) * token_nll(model, part)).sum() / mask.sum()
        loss.backward()
    sum_gradients(model, group)

So weights are those of whole trajectories wherever these are cut. Losses and utilities of a part
stand at the token that predicts: the label of its last token is the first of the next part.

Memory for activations falls with the number of processes, but for masks: attention
implementations that take a mask of [B, 1, T, T] ("sdpa" with padding, packing or a window, and
"eager") make it in every process. Communication: for each layer and pass, (2 + 2 * kv_heads /
heads) times the hidden states of the part, twice that in the forward-mode pass.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any
from zlib import crc32

import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    packed_sequence_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vcore_train import attention
from vcore_train.modeling import (
    CONTEXT_PARALLEL,
    IGNORE_INDEX,
    causal_lm,
    check_packing,
    configs_of,
    packed_positions,
    segment_starts,
    supervised_labels,
    trainable_parameters,
)
from vcore_train.processes import Processes

__all__ = [
    "context_parallel",
    "gather_tokens",
    "shard_batch",
    "split_tokens",
    "sum_gradients",
]

Group = dist.ProcessGroup | None  # None: this process alone

# Layers whose tokens meet in attention alone, and whose mask is known from its arguments.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Their frequencies follow the largest position of a call, which the parts do not share.
_ROPE_TYPES_BY_LENGTH = frozenset({"dynamic", "longrope"})

_groups: dict[int, Group] = {}  # by the id of a configuration whose model is in a context now


# ---- batches ----


def shard_batch(batch: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """This process's part of ``batch``: the tokens that follow those of the process before it.

    ``batch`` is padded (``attention_mask``) or packed (``cu_seq_lens_q`` or restarting
    ``position_ids``), as the collators make it, and the same on every process; T is padded up to a
    multiple of their number r. One collective of a few bytes compares them.

    Returns:
        ``input_ids`` and ``position_ids`` [B, T/r]; ``shift_labels`` [B, T/r] where the batch has
        labels: the label of the *next* token, -100 where that is not supervised or begins another
        trajectory; every other [B, T] tensor, split as it is. About the whole sequence, for
        attention: ``attention_mask`` [B, T], and for a packed batch ``cu_seq_lens_q`` and its kin,
        where padding is a trajectory of its own. What is left of the batch is passed on.

    Raises:
        ValueError: batches that differ, no or empty ``input_ids``, an attention mask of more than
            two dimensions or beside ``cu_seq_lens_q``, positions that are not [B, T],
            ``cu_seq_lens_q`` that cuts a trajectory.
    """
    processes = Processes(group)
    _check_same(batch, processes)
    input_ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
        came = list(input_ids.shape) if isinstance(input_ids, Tensor) else input_ids
        raise ValueError(f"shard_batch: expected input_ids [B, T] with tokens in it, got {came}.")
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"shard_batch: attention_mask has shape {list(mask.shape)}, input_ids "
            f"{list(input_ids.shape)}. Pass the mask of the padding alone, [B, T]."
        )
    positions, starts = _positions(batch), None
    if _is_packed(batch, positions):
        if mask is not None:
            raise ValueError(
                "shard_batch: the batch has both attention_mask and cu_seq_lens_q. Leave the mask "
                "out: a packed batch has no padding."
            )
        starts = segment_starts({**batch, "labels": input_ids})
        if batch.get("cu_seq_lens_q") is not None and batch["cu_seq_lens_q"][-1] < starts.numel():
            starts.view(-1)[int(batch["cu_seq_lens_q"][-1])] = True
    extra = -input_ids.shape[1] % processes.count
    part: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == input_ids.shape and value.dim() == 2:
            value = _own_part(F.pad(value, (0, extra)), processes)
        part[name] = value
    padding = torch.arange(extra, device=positions.device).expand(len(positions), -1)
    part["position_ids"] = _own_part(torch.cat([positions, padding], dim=1), processes)
    if part.pop("labels", None) is not None:
        check_packing(batch)
        part["shift_labels"] = split_tokens(supervised_labels(batch), group, fill=IGNORE_INDEX)
    if starts is None:
        mask = torch.ones_like(input_ids) if mask is None else mask
        # Nothing before it sees what is added: where no token is masked, none needs to be.
        part["attention_mask"] = F.pad(mask, (0, extra), value=int(mask.all()))
        return part
    starts = F.pad(starts, (0, extra))
    starts[:, input_ids.shape[1] :][:, :1] = True
    ends = torch.tensor([starts.numel()], device=starts.device)
    boundaries = torch.cat([starts.flatten().nonzero()[:, 0], ends]).to(torch.int32)
    longest = int(boundaries.diff().max())
    part |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    part |= {"max_length_q": longest, "max_length_k": longest}
    if processes.count > 1:  # without it, transformers would look for segments in the part
        part["attention_mask"] = torch.ones_like(starts, dtype=torch.int64)
    return part


def gather_tokens(batch: Mapping[str, Any], values: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Losses or utilities of the parts, [B, T/r] each, as those of the whole ``batch``: [B, T].

    They come aligned with ``batch["labels"]``, as ``token_nll(model, batch)`` would give them, and
    without a graph. One all-gather for all of ``values``, which share a dtype.
    """
    processes, length = Processes(group), batch["input_ids"].shape[1]
    own = torch.stack([value.detach() for value in values])  # [n, B, T/r]
    expected = [*batch["input_ids"].shape[:1], -(-length // processes.count)]
    if list(own.shape[1:]) != expected:
        raise ValueError(
            f"gather_tokens: expected the values of a part {expected} of this batch, got "
            f"{list(own.shape[1:])}. Pass the batch that shard_batch was given."
        )
    if processes.count > 1:
        parts = [torch.empty_like(own) for _ in range(processes.count)]
        dist.all_gather(parts, own, group=group)
        own = torch.cat(parts, dim=-1)  # [n, B, T]
    return list(F.pad(own, (1, 0))[..., :length].unbind())


def split_tokens(values: Tensor, group: Group, *, fill: float = 0) -> Tensor:
    """This process's part [B, T/r] of values [B, T] that are aligned with labels, such as weights.

    The value of a label stands where the token before it is: the inverse of :func:`gather_tokens`.
    ``fill`` is for the last token, which predicts nothing, and for padding.
    """
    processes = Processes(group)
    extra = -values.shape[1] % processes.count
    return _own_part(F.pad(values[:, 1:], (0, 1 + extra), value=fill), processes)


def _own_part(values: Tensor, processes: Processes) -> Tensor:
    return values.chunk(processes.count, dim=1)[processes.rank].contiguous()


def _positions(batch: Mapping[str, Any]) -> Tensor:
    """[B, T], as the decoder takes them for the whole batch."""
    input_ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None and batch.get("cu_seq_lens_q") is not None:
        return packed_positions(batch["cu_seq_lens_q"], input_ids)
    if positions is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    if positions.dim() != 2 or positions.shape[1] != input_ids.shape[1]:
        raise ValueError(
            f"shard_batch: expected position_ids [B, T] = {list(input_ids.shape)}, got "
            f"{list(positions.shape)}."
        )
    return positions.expand_as(input_ids)


def _is_packed(batch: Mapping[str, Any], positions: Tensor) -> bool:
    if batch.get("cu_seq_lens_q") is not None:
        return True
    return batch.get("attention_mask") is None and bool((positions.diff() != 1).any())


def _check_same(batch: Mapping[str, Any], processes: Processes) -> None:
    if processes.count == 1:
        return
    own = sorted((name, *_fingerprint(value)) for name, value in batch.items())
    all_of_them: list[Any] = [None] * processes.count
    dist.all_gather_object(all_of_them, own, group=processes.group)
    for rank, other in enumerate(all_of_them):
        if other != all_of_them[0]:
            names = sorted({item[0] for item in set(other) ^ set(all_of_them[0])})
            raise ValueError(
                f"shard_batch: the batches of ranks 0 and {rank} differ in {', '.join(names)}. All "
                "processes of the group share one batch: give their samplers the same seed and "
                "the rank of the group, not of the process."
            )


def _fingerprint(value: Any) -> tuple[str, int]:
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return f"{value.dtype} {list(value.shape)}", crc32(content.numpy().tobytes())
    return type(value).__name__, crc32(repr(value).encode())


# ---- gradients ----


def sum_gradients(model: nn.Module, group: Group) -> None:
    """Adds the gradients of the trained parameters up over the group.

    With losses divided by the supervised tokens of the whole batch, they are then those of the
    whole batch. A parameter that no process has a gradient of has none afterwards.
    """
    parameters = list(trainable_parameters(model).values())
    if Processes(group).count == 1 or not parameters:
        return
    used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    used = Processes(group).sum(used.to(torch.float32))
    for p, count in zip(parameters, used.tolist(), strict=True):
        if count:
            own = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = Processes(group).sum(own.contiguous())


# ---- attention ----


@contextmanager
def context_parallel(model: nn.Module, group: Group) -> Iterator[None]:
    """Inside, ``model`` takes the parts of :func:`shard_batch` and its attention sees the whole.

    The model's own attention implementation ("sdpa", "eager", flash attention, "vcore_jvp" in a
    forward-mode pass) works on the gathered sequence; on leaving, everything is as before. Batches
    that are not parts run as ever, each process for itself. All processes of the group call the
    model equally often and in the same order, those whose part has no supervised token too. Every
    forward pass has its backward pass inside where gradient checkpointing is on.

    Gradients are this process's share: :func:`sum_gradients`. Parameters must be the same in every
    process. Dropout draws from each process's own generator: seed these differently for training,
    since processes that draw alike would drop the same entries in different tokens and heads.

    Args:
        model: a causal LM of transformers, plain or PEFT-wrapped.
        group: the processes that share a batch. Their number divides the query heads; key and value
            heads may be fewer, they are repeated as needed.

    Raises:
        ValueError: heads that the group's size does not divide, an attention that cannot be
            exchanged, layers other than full and sliding-window attention, rotary frequencies that
            depend on the length of the sequence ("dynamic", "longrope"), a second context.
    """
    lm = causal_lm(model)
    _check_model(lm, Processes(group).count)
    configs = configs_of(lm)
    saved = {id(c): vars(c).get("_attn_implementation_internal") for c in configs}
    own = {name for name in saved.values() if name is not None}
    for inner in {*own, "eager", attention.NAME}:
        AttentionInterface.register(CONTEXT_PARALLEL + inner, partial(_attention, inner))
        AttentionMaskInterface.register(CONTEXT_PARALLEL + inner, partial(_mask, inner))
    try:
        for config in configs:
            _groups[id(config)] = group
            inner = saved[id(config)] or "eager"
            config._attn_implementation_internal = CONTEXT_PARALLEL + inner
        yield
    finally:
        for config in configs:
            _groups.pop(id(config), None)
            config._attn_implementation_internal = saved[id(config)]


def sequence_processes(model: nn.Module) -> list[Processes]:
    """Those that share the sequences of ``model``: one group inside :func:`context_parallel`."""
    key = id(causal_lm(model).config)
    return [Processes(_groups[key])] if key in _groups else []


def _check_model(lm: PreTrainedModel, count: int) -> None:
    config, name = lm.config.get_text_config(), type(lm).__name__
    if any(id(c) in _groups for c in configs_of(lm)):
        raise ValueError(f"context_parallel: {name} is in a context already. Leave that first.")
    if not attention.serves(lm):
        raise ValueError(
            f"context_parallel: the attention of {name} cannot be exchanged: transformers has "
            "nothing but the model's own for it."
        )
    heads = config.num_attention_heads
    if isinstance(heads, int):
        _check_heads(heads, count, name)
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise ValueError(
            f"context_parallel: {name} has layers of type {', '.join(others)}; only full and "
            "sliding-window attention can be split over processes here."
        )
    rope_types = _rope_types(getattr(config, "rope_parameters", None)) & _ROPE_TYPES_BY_LENGTH
    if rope_types:
        raise ValueError(
            f"context_parallel: {name} has rotary embeddings of type "
            f"{', '.join(sorted(rope_types))}, which depend on the length of the sequence, and the "
            "processes hold different parts of it. Use 'linear' or 'yarn' scaling."
        )


def _check_heads(heads: int, count: int, name: str) -> None:
    if heads % count:
        raise ValueError(
            f"context_parallel: {name} has {heads} attention heads, which {count} processes cannot "
            f"share evenly. Use a group whose size divides {heads}."
        )


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, Mapping):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    own = parameters.get("rope_type")
    return set().union(*nested, {own} if isinstance(own, str) else set())


@dataclass(eq=False)
class _Mask:
    """What the attention layers get as their mask: that of a whole sequence is made on first use,
    since only then its segments are known. One object serves the layers of a pass."""

    make: Callable[..., Any]  # of the inner implementation, for these sizes
    keys: Tensor | None = None  # bool [B, T] of the whole sequence: padding
    function: Callable | None = None  # causal or a window
    made: Any = None
    is_made: bool = False

    @property
    def of_part(self) -> bool:
        return self.keys is not None

    def contiguous(self) -> "_Mask":
        """What transformers asks of every mask that it makes ahead for a static cache."""
        return self

    def get(self, boundaries: Tensor | None) -> Any:
        if not self.is_made:
            self.made, self.is_made = self._make(boundaries), True
        return self.made

    def _make(self, boundaries: Tensor | None) -> Any:
        if self.keys is None:
            return self.make()
        if boundaries is None:
            return self.make(mask_function=self.function, attention_mask=self.keys)
        index = torch.arange(self.keys.numel(), device=self.keys.device)
        ends = boundaries[1:].to(index)
        segment = torch.bucketize(index, ends, right=True).view(self.keys.shape)
        assert self.function is not None
        function = and_masks(self.function, packed_sequence_mask_function(segment))
        return self.make(mask_function=function, attention_mask=None, allow_is_causal_skip=False)


def _mask(
    inner: str,
    *,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # a tensor with a static cache
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    config: Any,
    **options: Any,
) -> _Mask:
    """In AttentionMaskInterface. A part is recognised by a mask r times as long as its tokens."""
    make = ALL_MASK_ATTENTION_FUNCTIONS.get(inner, _no_mask)
    make = partial(make, config=config, use_vmap=use_vmap, q_offset=q_offset, **options)
    length = 0 if attention_mask is None else attention_mask.shape[-1]
    count = Processes(_groups[id(config)]).count
    if length != q_length * count or q_offset != 0:
        make = partial(make, attention_mask=attention_mask, mask_function=mask_function)
        return _Mask(partial(make, q_length=q_length, kv_length=kv_length))
    if kv_length != length:
        raise ValueError(
            "context_parallel: a model on a part of a batch keeps no key-value cache. Pass "
            "use_cache=False."
        )
    if use_vmap:
        raise ValueError("context_parallel: the model lays a mask of its own over the causal one.")
    return _Mask(partial(make, q_length=length, kv_length=length), attention_mask, mask_function)


def _no_mask(**_: Any) -> None:
    """Of an implementation without a mask function, as in transformers."""


# What callers hand to every attention. Any other tensor may concern the tokens or heads of this
# process alone: it is refused.
_UNUSED = frozenset({"position_ids", "position_embeddings", "cache_position", "shift_labels"})
_KNOWN = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def _attention(
    inner: str,
    module: nn.Module,
    query: Tensor,  # [B, heads, T/r, D]
    key: Tensor,  # [B, kv_heads, T/r, D]
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In AttentionInterface: [B, T/r, heads, D]."""
    name = type(module).__name__
    if not isinstance(attention_mask, _Mask):
        raise ValueError(
            f"context_parallel: {name} gets a mask that was not made by transformers' mask "
            "functions, and cannot be split over processes."
        )
    mask = attention_mask.get(kwargs.get("cu_seq_lens_q"))
    forward = _implementation(inner, module)
    groups = query.shape[1] // key.shape[1]
    if not attention_mask.of_part:
        return forward(_as_inner(module, inner, groups), query, key, value, mask, **kwargs)
    group = _groups[id(module.config)]
    count = Processes(group).count
    _check_heads(query.shape[1], count, name)
    kwargs = {k: v for k, v in kwargs.items() if k not in _UNUSED}
    others = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _KNOWN]
    if others:
        raise ValueError(
            f"context_parallel: {name} passes {', '.join(others)} to its attention, which cannot "
            "be split over processes here."
        )
    # The longest runs of query heads that share a key and fit into one process.
    run = gcd(groups, query.shape[1] // count)
    if run != groups:
        heads = torch.arange(0, query.shape[1], run, device=key.device) // groups
        key, value = key.index_select(1, heads), value.index_select(1, heads)
    query, key, value = exchange([query, key, value], group)
    out, *_ = forward(_as_inner(module, inner, run), query, key, value, mask, **kwargs)
    return exchange([out], group)[0], None


def _implementation(inner: str, module: nn.Module) -> Callable[..., Any]:
    if inner in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[inner]
    # Eager attention is a function in the file of each model.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise attention.AttentionUnsupportedError(
            f"context_parallel: {type(module).__name__} has no eager attention of its own. Load "
            "the model with attn_implementation='sdpa'."
        )
    return eager


class _With:
    """An object as it is but for some attributes."""

    def __init__(self, of: Any, **attributes: Any):
        self.__dict__ |= {"_of": of, **attributes}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def _as_inner(module: nn.Module, inner: str, groups: int) -> Any:
    """The attention layer as its implementation shall see it."""
    config = _With(module.config, _attn_implementation=inner)
    return _With(module, config=config, num_key_value_groups=groups)


# ---- the exchange ----


def exchange(
    tensors: Sequence[Tensor], group: Group, *, split: int = 1, join: int = 2
) -> list[Tensor]:
    """Each tensor's dimension ``split`` dealt out over the processes of ``group``, in equal parts;
    what arrives is joined along dimension ``join``, in the order of the ranks.

    Differentiable in both modes; the reverse has ``split`` and ``join`` exchanged. One all-to-all
    for each dtype, which takes tangents along with the values.
    """
    if Processes(group).count == 1:
        return list(tensors)
    duals = [fwAD.unpack_dual(x) for x in tensors] if fwAD._current_level >= 0 else []
    carriers = [n for n, dual in enumerate(duals) if dual.tangent is not None]
    if not carriers:
        return list(_Exchange.apply(group, split, join, *tensors))
    tangents = [duals[n].tangent.detach() for n in carriers]
    moved = _Exchange.apply(group, split, join, *(dual.primal for dual in duals), *tangents)
    out = list(moved[: len(duals)])
    for n, tangent in zip(carriers, moved[len(duals) :], strict=True):
        out[n] = fwAD.make_dual(out[n], tangent.detach())
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, split, join, *tensors):
        ctx.exchange = group, split, join
        ctx.set_materialize_grads(False)
        return tuple(_exchanged(tensors, group, split, join))

    @staticmethod
    def backward(ctx, *gradients):
        group, split, join = ctx.exchange
        present = [n for n, gradient in enumerate(gradients) if gradient is not None]
        back = _Exchange.apply(group, join, split, *(gradients[n] for n in present))
        arrived = dict(zip(present, back, strict=True))
        return None, None, None, *(arrived.get(n) for n in range(len(gradients)))


def _exchanged(tensors: Sequence[Tensor], group: Group, split: int, join: int) -> list[Tensor]:
    count = Processes(group).count
    dealt = [x.unflatten(split, (count, -1)).movedim(split, 0) for x in tensors]
    arrived: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        chosen = [n for n, x in enumerate(tensors) if x.dtype == dtype]
        sent = torch.cat([dealt[n].reshape(count, -1) for n in chosen], dim=1)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        sizes = [dealt[n][0].numel() for n in chosen]
        arrived |= dict(zip(chosen, received.split(sizes, dim=1), strict=True))
    return [
        arrived[n].reshape(x.shape).movedim(0, join).flatten(join, join + 1)
        for n, x in enumerate(dealt)
    ]
