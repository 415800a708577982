"""The attention implementation ``"vcore_jvp"`` for transformers: it has a forward-mode derivative.

Importing this module registers it, attention and mask. Where a query, key or value carries a
tangent, output and tangent come as one dual tensor from :func:`vcore_kernels.attention_jvp`;
otherwise it is PyTorch's scaled_dot_product_attention, with its gradients. ``token_utilities``
switches a model to it and back by itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vcore_kernels import attention_jvp
from vcore_kernels.backends.reference_attention import dense_attention_jvp, visible_keys

__all__ = ["NAME", "AttentionUnsupportedError", "VisibleKeys", "serves"]

NAME = "vcore_jvp"
# Tensors that callers hand to every attention, of which this one has no need. Any other may change
# the result (attention sinks, position biases, sparse indices): it is refused.
_IGNORED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "position_embeddings",
        "position_ids",
    }
)
_MASK_ROWS = 256  # rows of a mask that are looked at together


class AttentionUnsupportedError(NotImplementedError):
    """This attention layer asks for something that ``"vcore_jvp"`` does not compute."""


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """What the attention layers get as their mask: causal, and what else limits the keys.

    It takes the place of a [B, 1, T, T] mask wherever that has one of these forms.
    """

    length: int
    device: torch.device
    key_mask: Tensor | None = None  # bool [B, T]: padding on either side
    cu_seqlens: Tensor | None = None  # int32 [S + 1] over the B * T flattened tokens
    window: int | None = None

    def contiguous(self) -> "VisibleKeys":
        """What transformers asks of every mask that it makes ahead for a static cache."""
        return self

    @cached_property
    def dense(self) -> Tensor | None:
        """The same as bool, broadcasting to [B, 1, T, T]; None where it is causal alone."""
        if self.key_mask is None and self.cu_seqlens is None and self.window is None:
            return None
        if self.cu_seqlens is None:
            window = self.window
            return visible_keys(self.length, self.key_mask, None, True, window, self.device)
        rows = int(self.cu_seqlens[-1]) // self.length
        segment = _segments(self.cu_seqlens, rows, self.length)
        visible = visible_keys(self.length, None, None, True, self.window, self.device)
        return visible & (segment[:, None, :, None] == segment[:, None, None, :])


def serves(lm: PreTrainedModel) -> bool:
    """Whether the attention of ``lm`` can be exchanged, and is a function of its arguments alone.

    Not so where transformers has nothing but the model's own eager attention for it.
    """
    return lm._can_set_attn_implementation() and bool(
        lm._supports_sdpa or lm._supports_flash_attn or lm._supports_flex_attn
    )


# ---- the mask ----


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # a tensor with a static cache
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> VisibleKeys | Tensor:
    """:class:`VisibleKeys` where the mask has that form, otherwise bool [B, 1, Tq, Tk]."""
    square = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if square and q_length and not use_vmap:
        device = torch.device(device)
        if allow_is_causal_skip and local_size is None:  # nothing but causality and padding
            return VisibleKeys(q_length, device, attention_mask)
        offsets = None
        packed = attention_mask is None and not allow_is_causal_skip
        if packed:
            offsets = _segment_offsets(mask_function, batch_size, q_length, device)
        if (allow_is_causal_skip or packed) and _is_window(
            mask_function, batch_size, q_length, local_size, offsets, device
        ):
            return VisibleKeys(q_length, device, attention_mask, offsets, local_size)
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert mask is not None
    return mask


def _segment_offsets(
    mask_function: Callable, batch: int, length: int, device: torch.device
) -> Tensor:
    """Where tokens do not see the one before them: int32 [S + 1] over B * T tokens."""
    rows = torch.arange(batch, device=device)[:, None, None, None]
    index = torch.arange(length, device=device)[None, None, :, None]
    sees = mask_function(rows, torch.zeros_like(rows), index, (index - 1).clamp_min(0))
    starts = ~sees.expand(batch, 1, length, 1).reshape(batch, length)
    starts[:, 0] = True
    ends = torch.tensor([batch * length], device=device)
    return torch.cat([starts.flatten().nonzero().flatten(), ends]).to(torch.int32)


def _segments(offsets: Tensor, batch: int, length: int) -> Tensor:
    """The segment of each token [B, T]."""
    index = torch.arange(batch * length, device=offsets.device)
    return torch.bucketize(index, offsets[1:].to(index.dtype), right=True).view(batch, length)


def _is_window(
    mask_function: Callable,
    batch: int,
    length: int,
    window: int | None,
    offsets: Tensor | None,
    device: torch.device,
) -> bool:
    """Whether ``mask_function`` is a causal window within segments, entry by entry.

    A chunked mask comes with the same arguments as a sliding one, and any other overlay with those
    of a packed batch. Blocks of rows, so that memory grows with T alone.
    """
    rows = torch.arange(batch, device=device)[:, None, None, None]
    keys = torch.arange(length, device=device)[None, None, None, :]
    segment = None if offsets is None else _segments(offsets, batch, length)[:, None]  # [B, 1, T]
    for begin in range(0, length, _MASK_ROWS):
        queries = keys[..., begin : begin + _MASK_ROWS].mT
        expected = keys <= queries
        if window is not None:
            expected = expected & (keys > queries - window)
        if segment is not None:
            expected = expected & (
                segment[:, :, begin : begin + _MASK_ROWS, None] == segment[:, :, None]
            )
        given = mask_function(rows, torch.zeros_like(rows), queries, keys)
        if not bool((given == expected).all()):
            return False
    return True


# ---- attention ----


def _attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, Tq, D]
    key: Tensor,  # [B, kv_heads, Tk, D]
    value: Tensor,
    attention_mask: VisibleKeys | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, Tq, heads, D]; a dual tensor where query, key or value is one."""
    others = [
        name
        for name, given in kwargs.items()
        if name not in _IGNORED and (isinstance(given, Tensor) or (name == "cache" and given))
    ]
    if others:
        raise AttentionUnsupportedError(
            f"{type(module).__name__} passes {', '.join(others)} to its attention, which "
            f"{NAME!r} does not know."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    duals = [fwAD.unpack_dual(x) for x in (query, key, value)] if _differentiating() else []
    if not any(dual.tangent is not None for dual in duals):
        return _plain(module, query, key, value, attention_mask, dropout, scale, is_causal, softcap)
    if dropout:
        raise AttentionUnsupportedError(
            f"{type(module).__name__} applies dropout {dropout} to its attention, which "
            f"{NAME!r} does not. Put the model in eval mode."
        )
    primals, tangents = [d.primal for d in duals], [d.tangent for d in duals]
    mask = attention_mask
    if torch.is_grad_enabled() and any(primal.requires_grad for primal in primals):
        # attention_jvp gives no gradients: the primal is PyTorch's, with its graph.
        with torch.no_grad():
            tangent = _dual(primals, tangents, mask, scale, is_causal, softcap)[1]
        q, k, v = primals
        out = _plain(module, q, k, v, mask, dropout, scale, is_causal, softcap)[0]
        return fwAD.make_dual(out, tangent.transpose(1, 2)), None
    out, dout = _dual(primals, tangents, mask, scale, is_causal, softcap)
    return fwAD.make_dual(out.transpose(1, 2), dout.transpose(1, 2)), None


def _dual(
    primals: list[Tensor],
    tangents: list[Tensor | None],
    mask: VisibleKeys | Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Output and tangent, each [B, heads, Tq, D]."""
    query, key = primals[:2]
    if mask is None and query.shape[2] == key.shape[2]:
        return attention_jvp(*primals, *tangents, causal=is_causal, scale=scale, softcap=softcap)
    if isinstance(mask, VisibleKeys):
        return _visible_jvp(primals, tangents, mask, scale, softcap)
    visible, bias = _dense(mask, query, key, is_causal)
    (q, k, v), (dq, dk, dv) = primals, tangents
    return dense_attention_jvp(q, k, v, dq, dk, dv, visible, bias, scale, softcap or 0.0)


def _differentiating() -> bool:
    return fwAD._current_level >= 0


def _visible_jvp(
    primals: list[Tensor],
    tangents: list[Tensor | None],
    mask: VisibleKeys,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    options: Any = {"causal": True, "scale": scale, "softcap": softcap, "window": mask.window}
    if mask.cu_seqlens is None:
        return attention_jvp(*primals, *tangents, key_mask=mask.key_mask, **options)
    batch = primals[0].shape[0]

    packed: list[Any] = [  # [heads, B * T, D]
        None if x is None else x.transpose(0, 1).flatten(1, 2) for x in (*primals, *tangents)
    ]
    packed = list(attention_jvp(*packed, cu_seqlens=mask.cu_seqlens, **options))
    out, dout = (x.unflatten(1, (batch, -1)).transpose(0, 1) for x in packed)
    return out, dout


def _dense(
    mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A 4-D mask as (bool, None) or (None, additive)."""
    if mask is None:
        if not is_causal or query.shape[2] == 1:
            return None, None
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        return ones.tril(), None
    mask = mask[..., : key.shape[2]]
    return (mask, None) if mask.dtype == torch.bool else (None, mask)


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: VisibleKeys | Tensor | None,
    dropout: float,
    scale: float,
    is_causal: bool,
    softcap: float | None,
) -> tuple[Tensor, None]:
    """Without a tangent: scaled_dot_product_attention, or plain PyTorch for soft-capped scores."""
    if isinstance(mask, VisibleKeys):
        mask, is_causal = mask.dense, True
    if softcap is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=scale,
            is_causal=is_causal,
        )
    groups = query.shape[1] // key.shape[1]
    scores = scale * (query @ repeat_kv(key, groups).mT)
    scores = softcap * torch.tanh(scores / softcap)
    visible, bias = _dense(mask, query, key, is_causal)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    elif bias is not None:
        scores = scores + bias
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    p = nn.functional.dropout(p, p=dropout, training=module.training)
    return (p @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
