"""How a Hugging Face causal language model is put together: decoder, head, parameters, probing.

The one module that knows it. Everything else sees hidden states [B, T, H], a :class:`Head` and
named parameters. Models may be plain or PEFT-wrapped; unwrap DDP and torch.compile first
(Accelerate's ``unwrap_model`` does both).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vcore_kernels import linear_nll

IGNORE_INDEX = -100
# Keys of a batch that are for the loss or set here, never for the decoder.
_NOT_FOR_DECODER = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "use_cache", "return_dict"}
)
# Begins the attention implementation of a model in vcore_train.context_parallel; what follows is
# the implementation that works on the gathered sequence.
CONTEXT_PARALLEL = "vcore_ulysses:"

# Where architectures keep the factor on their logits: (config attribute, model types, factor from
# value). One name does not mean one thing: Granite divides by logits_scaling, HyperCLOVA X
# multiplies by it, MPT's logit_scale is not used at all. ``head_check`` catches what this
# table does not know.
_LOGIT_SCALES = (
    ("logit_scale", ("cohere",), lambda value: value),
    ("logits_scaling", ("granite", "minicpm3"), lambda value: 1.0 / value),
    ("logits_scaling", ("hyperclovax",), lambda value: value),
    ("lm_head_multiplier", ("falcon_h1",), lambda value: value),
    ("output_multiplier", ("muse",), lambda value: value),
    ("logits_mup_width_multiplier", ("inkling",), lambda value: 1.0 / value),
)
_LOGIT_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """Logits are ``softcap(scale * (hidden @ weight.T + bias))``; hidden: :func:`hidden_states`."""

    weight: Tensor  # [V, H], or [V, H + r] where a LoRA adapter of rank r sits on the head
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    scale: float = 1.0

    def options(self) -> dict[str, Any]:
        """Everything but the weight, as keywords of the head operators in vcore_kernels."""
        return {"bias": self.bias, "softcap": self.softcap, "scale": self.scale}

    def detach(self) -> "Head":
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def tempered(self, temperature: float) -> "Head":
        """With the logits of the distribution that is sampled from at ``temperature``.

        Raises ValueError for a soft-capped head: the division would have to follow the cap.
        """
        if temperature == 1:
            return self
        if self.softcap is not None:
            raise ValueError(
                f"a head with soft-capped logits has no log-probabilities at temperature "
                f"{temperature} here. Sample at temperature 1."
            )
        return replace(self, scale=self.scale / temperature)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``, which may be PEFT-wrapped.

    Raises TypeError for anything else, and ValueError for encoder-decoder models and for PEFT
    methods that change the inputs (prompt and prefix tuning) rather than layers.
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{model.active_peft_config.peft_type} adapters change the model's inputs, which a "
                "pass through the decoder alone does not see. Use LoRA or another adapter that "
                "lives in layers."
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            "expected a transformers PreTrainedModel or a PeftModel around one, got "
            f"{type(model).__name__}. Unwrap DDP and torch.compile first "
            "(accelerator.unwrap_model)."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; expected a causal LM.")
    return model


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder: token ids to last hidden states, after the final norm and without the head."""
    lm = causal_lm(model)
    decoder = lm.get_decoder()
    if decoder is lm or lm.get_output_embeddings() is None:
        raise ValueError(
            f"{type(lm).__name__} has no output head beside its decoder. Load it with "
            "AutoModelForCausalLM."
        )
    return decoder


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers, first to last. Raises ValueError where there is no list of them."""
    count = causal_lm(model).config.get_text_config().num_hidden_layers
    for child in decoder_of(model).children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(
        f"{type(causal_lm(model)).__name__} keeps its {count} layers in no list of that length. "
        "Choose parameters by their names."
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with ``requires_grad`` by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What the head reads: the decoder's last hidden states [B, T, H]. The head itself is not run.

    ``inputs`` is a batch as a data collator makes it. ``labels`` and ``num_items_in_batch`` are
    left out, everything else (attention_mask, position_ids, ``cu_seq_lens_q`` and its kin) reaches
    the decoder. A packed batch without position_ids gets them from ``cu_seq_lens_q``, so that every
    attention implementation keeps its segments apart.

    With a LoRA adapter on the head, r more columns ``scaling * A(dropout(h))`` follow; the columns
    of ``head_of(model).weight`` match. So an adapter is exact here, also where rounding ``W +
    scaling * B @ A`` to W's precision would lose it.
    """
    kwargs = {k: v for k, v in inputs.items() if k not in _NOT_FOR_DECODER}
    if kwargs.get("cu_seq_lens_q") is not None and kwargs.get("position_ids") is None:
        kwargs["position_ids"] = packed_positions(kwargs["cu_seq_lens_q"], kwargs["input_ids"])
    hidden = decoder_of(model)(**kwargs, use_cache=False, return_dict=True).last_hidden_state
    columns = [hidden]
    for layer, adapter in _head_adapters(model):
        lora_a = layer.lora_A[adapter]
        rows = layer.lora_dropout[adapter](hidden.to(lora_a.weight.dtype))
        columns.append(lora_a(rows) * layer.scaling[adapter])
    return torch.cat(columns, dim=-1) if len(columns) > 1 else hidden


def head_of(model: nn.Module) -> Head:
    """The output head: weight, bias, and how the architecture scales and soft-caps its logits.

    A LoRA adapter on the head is part of it (see :func:`hidden_states`), and so are weights that
    PEFT keeps in ``modules_to_save`` or ``trainable_token_indices``. Raises ValueError for a head
    that is not a plain linear layer: quantised, or with an adapter other than LoRA.
    """
    lm = causal_lm(model)
    module = lm.get_output_embeddings()
    if module is None:
        raise ValueError(
            f"{type(lm).__name__} has no output head (get_output_embeddings() is None)."
        )
    adapters = list(_head_adapters(model))
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    weight, bias = base.weight, getattr(base, "bias", None)
    if not weight.is_floating_point():
        raise ValueError(
            f"the head's weight is {weight.dtype} (quantised), and its losses need a "
            "floating-point matrix. Keep lm_head out of the quantisation "
            "(llm_int8_skip_modules=['lm_head'])."
        )
    if adapters:
        columns: list[Any] = [layer.lora_B[adapter].weight for layer, adapter in adapters]
        weight = torch.cat([weight, *columns], dim=-1)
    for layer, adapter in adapters:
        lora_bias = layer.lora_B[adapter].bias
        if lora_bias is not None:
            lora_bias = lora_bias * layer.scaling[adapter]
            bias = lora_bias if bias is None else bias + lora_bias
    config = lm.config.get_text_config()
    return Head(weight, bias, _softcap(config), _scale(config))


class HeadPart(NamedTuple):
    """Where a parameter stands in :func:`head_of`."""

    parameter: nn.Parameter
    columns: slice | None  # of the weight; None: it is part of the bias
    factor: float = 1.0


def head_parts(model: nn.Module) -> list[HeadPart]:
    """The parameters that the head's weight and bias are made of, those of LoRA adapters too."""
    module: Any = causal_lm(model).get_output_embeddings()
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    end = base.weight.shape[1]
    parts = [HeadPart(base.weight, slice(0, end))]
    if getattr(base, "bias", None) is not None:
        parts.append(HeadPart(base.bias, None))
    for layer, adapter in _head_adapters(model):
        lora_b: Any = layer.lora_B[adapter]
        begin, end = end, end + lora_b.weight.shape[1]
        parts.append(HeadPart(lora_b.weight, slice(begin, end)))
        if lora_b.bias is not None:
            parts.append(HeadPart(lora_b.bias, None, layer.scaling[adapter]))
    return parts


def input_embeddings(model: nn.Module) -> Tensor:
    """The weight [V, H] that token ids are looked up in; a parameter unless PEFT composes it."""
    module: Any = causal_lm(model).get_input_embeddings()
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base.weight


def token_nll(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    head: Head | None = None,
    backend: str = "auto",
) -> Tensor:
    """Negative log-likelihood of every label in nats, fp32, aligned with ``inputs["labels"]``.

    0 where not supervised, at t = 0 and at the first token of each packed segment. Of a batch with
    ``shift_labels`` (:func:`label_shift`) it is aligned with these. The logits are never stored.
    Differentiable in both modes. ``head`` stands in for the model's own.
    """
    hidden = hidden_states(model, inputs)
    # After the decoder, also in the order of backward: FSDP reduces the gradients of a head that it
    # gathers with the final norm once the norm's backward is done.
    head = head_of(model) if head is None else head
    return linear_nll(
        hidden,
        head.weight,
        supervised_labels(inputs),
        shift=label_shift(inputs),
        ignore_index=IGNORE_INDEX,
        backend=backend,
        **head.options(),
    )


def label_shift(inputs: Mapping[str, Any]) -> int:
    """How many tokens before a label's place the one stands that predicts it: 1.

    0 where the batch has ``shift_labels`` instead of ``labels``, each at the token that predicts
    it, as :func:`vcore_train.context_parallel.shard_batch` makes them.
    """
    return 0 if _has_shift_labels(inputs) else 1


def _has_shift_labels(inputs: Mapping[str, Any]) -> bool:
    return inputs.get("labels") is None and inputs.get("shift_labels") is not None


def supervised_labels(inputs: Mapping[str, Any]) -> Tensor:
    """``inputs["labels"]`` [B, T] with -100 at every token that nothing precedes.

    These are t = 0 of each row and, in a packed batch, the first token of each segment. The number
    of supervised tokens is what is left. Of a batch with ``shift_labels`` (:func:`label_shift`) it
    is these, which have nothing of the kind. Raises ValueError where the batch has neither.
    """
    if _has_shift_labels(inputs):
        return inputs["shift_labels"]
    if inputs.get("labels") is None:
        raise ValueError(
            f"the batch has no labels (keys: {', '.join(sorted(inputs))}). Add `labels`, int64, "
            "shaped like input_ids, with -100 at tokens that are not supervised."
        )
    return inputs["labels"].masked_fill(segment_starts(inputs), IGNORE_INDEX)


def segment_starts(inputs: Mapping[str, Any]) -> Tensor:
    """Bool, shaped like ``inputs["labels"]`` [B, T]: True at the first token of each trajectory.

    That is t = 0 of each row; in a packed batch also each of ``cu_seq_lens_q`` or, without it and
    without an attention mask, each jump of ``position_ids``. Of a part of a batch, which has
    ``shift_labels``, it is the first token of each trajectory or of what the part has of it.
    """
    part = _has_shift_labels(inputs)
    starts = torch.zeros_like(inputs["shift_labels" if part else "labels"], dtype=torch.bool)
    starts[..., 0] = True
    boundaries, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if part and boundaries is not None:  # these are of the whole batch
        starts[..., 1:] |= inputs["position_ids"].diff() != 1
    elif boundaries is not None:
        inner = boundaries[:-1].to(starts.device, torch.int64)
        starts.view(-1)[inner[inner < starts.numel()]] = True
    elif positions is not None and inputs.get("attention_mask") is None and positions.dim() == 2:
        starts[..., 1:] |= positions[..., 1:] != positions[..., :-1] + 1
    return starts


def check_packing(inputs: Mapping[str, Any]) -> None:
    """Raises ValueError where ``cu_seq_lens_q`` of a packed batch does not fit the batch.

    That is where it does not begin at 0, leaves the batch or goes on from one row into the next,
    or where it and ``position_ids`` begin supervised trajectories at different tokens: attention
    would cut one of them in two, or join two.
    """
    boundaries, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if boundaries is None or _has_shift_labels(inputs):  # shard_batch has looked at the whole
        return
    labels = supervised_labels(inputs).flatten()
    boundaries = boundaries.to(labels.device, torch.int64)
    rises = boundaries.numel() > 0 and boundaries[0] == 0 and bool((boundaries.diff() >= 0).all())
    if not (rises and boundaries[-1] <= labels.numel()):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to at most the batch's {labels.numel()} tokens, got "
            f"{boundaries.tolist()[:8]}{'...' if boundaries.numel() > 8 else ''}."
        )
    rows = inputs["labels"].shape[0]
    starts = torch.arange(rows, device=labels.device) * (labels.numel() // max(rows, 1))
    supervised = (labels != IGNORE_INDEX).view(rows, -1).any(-1)
    across = supervised & (starts < boundaries[-1]) & ~torch.isin(starts, boundaries)
    if bool(across.any()):
        at = int(starts[across][0])
        raise ValueError(
            f"cu_seq_lens_q cuts a trajectory at token {at}, where a row of the batch begins, and "
            f"no token sees another row. Put {at} among the boundaries, or pack into one row."
        )
    if positions is None or positions.numel() != labels.numel():
        return
    cut = segment_starts(inputs).flatten()
    restarts = torch.ones_like(cut)
    restarts[1:] = positions.flatten().diff() != 1
    segment = (cut | restarts).cumsum(0) - 1
    supervised = torch.zeros_like(segment).index_add_(0, segment, (labels != IGNORE_INDEX).long())
    wrong = ((cut != restarts) & (supervised[segment] > 0)).nonzero().flatten().tolist()
    if wrong:
        at = wrong[0]
        what = "cuts a trajectory" if bool(cut[at]) else "has no boundary"
        raise ValueError(
            f"cu_seq_lens_q {what} at token {at} ({len(wrong)} such places), where position_ids go "
            f"from {int(positions.flatten()[at - 1])} to {int(positions.flatten()[at])}. Make both "
            "from the same lengths, or leave position_ids out: they then come from cu_seq_lens_q."
        )


@contextmanager
def probing(
    model: nn.Module, *, attention: str | None = "eager", checkpointing: bool = False
) -> Iterator[None]:
    """The model as a probe needs it; on leaving, by an exception too, everything is as before.

    Inside: dropout off (every module in eval mode), ``attention`` as attention implementation
    whatever the model was loaded with, experts eager (grouped GEMMs have no forward derivative),
    gradient checkpointing off unless ``checkpointing``, and autocast does not cache casts: a cast
    made without a graph, or of a perturbed weight, must not serve a later pass. Restored: each
    module's training flag, all configurations, the random number generators' states.
    ``requires_grad`` is not touched.

    Args:
        attention: implementation to switch to. None leaves attention and experts as they are,
            which is right wherever no forward-mode derivative is taken.
        checkpointing: keep gradient checkpointing where it is on, with dropout off all the same.

    Raises:
        ValueError: the architecture cannot change its attention after loading.
    """
    lm = causal_lm(model)
    devices = {p.device for p in lm.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
        stack.enter_context(_restored_configs(lm))
        stack.enter_context(_eval_mode(model, checkpointing))
        stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
        torch.set_autocast_cache_enabled(False)
        if attention is not None:
            _switch_attention(lm, attention)
            submodels = [m for m in lm.modules() if isinstance(m, PreTrainedModel)]
            if any(m._can_set_experts_implementation() for m in submodels):
                lm.set_experts_implementation("eager")
        yield


def _head_adapters(model: nn.Module) -> Iterator[tuple[LoraLinear, str]]:
    """The active LoRA adapters on the head, as (layer, adapter name)."""
    layer = causal_lm(model).get_output_embeddings()
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters or layer.merged:
        return
    if not isinstance(layer, LoraLinear) or layer.fan_in_fan_out:
        raise ValueError(
            f"the head carries an adapter of type {type(layer).__module__}.{type(layer).__name__}. "
            "On the head only plain LoRA over a linear layer that is not quantised is supported: "
            "leave lm_head out of target_modules, or train it whole with "
            "modules_to_save=['lm_head']."
        )
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant:
            raise ValueError(
                f"adapter {adapter!r} on the head is a LoRA variant (DoRA, aLoRA, ...). On the "
                "head only plain LoRA is supported: leave lm_head out of target_modules."
            )
        if adapter in layer.lora_A:
            yield layer, adapter


def _softcap(config: Any) -> float | None:
    for name in _LOGIT_SOFTCAPS:
        value = getattr(config, name, None)
        if value:
            return float(value)
    return None


def _scale(config: Any) -> float:
    for name, model_types, factor in _LOGIT_SCALES:
        value = getattr(config, name, None)
        if value is not None and config.model_type.startswith(model_types):
            return float(factor(value))
    return 1.0


def packed_positions(boundaries: Tensor, input_ids: Tensor) -> Tensor:
    """Positions [B, T] that restart at each boundary of the flattened batch."""
    boundaries = boundaries.to(input_ids.device, torch.int64)
    index = torch.arange(input_ids.numel(), device=input_ids.device)
    segment = torch.searchsorted(boundaries, index, right=True) - 1
    return (index - boundaries[segment]).view(input_ids.shape)


def configs_of(lm: PreTrainedModel) -> list[Any]:
    """Every configuration in ``lm``, those of its parts too, each once."""
    configs: dict[int, Any] = {}
    pending: list[Any] = [m.config for m in lm.modules() if isinstance(m, PreTrainedModel)]
    while pending:
        config = pending.pop()
        if config is not None and id(config) not in configs:
            configs[id(config)] = config
            pending += [getattr(config, key, None) for key in config.sub_configs]
    return list(configs.values())


@contextmanager
def _restored_configs(lm: PreTrainedModel) -> Iterator[None]:
    """Puts attention and experts implementations of every configuration in ``lm`` back."""
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    configs = configs_of(lm)
    saved = [(vars(c), {n: vars(c)[n] for n in names if n in vars(c)}) for c in configs]
    try:
        yield
    finally:
        for attributes, values in saved:
            for name in names:
                attributes.pop(name, None)
            attributes.update(values)


def _switch_attention(lm: PreTrainedModel, attention: str) -> None:
    decoder = lm.get_decoder()
    if str(lm.config._attn_implementation).startswith(CONTEXT_PARALLEL):
        attention = CONTEXT_PARALLEL + attention
    if lm.config._attn_implementation != attention:
        if not lm._can_set_attn_implementation():
            raise ValueError(
                f"{type(lm).__name__} cannot change its attention after loading, and its "
                f"{lm.config._attn_implementation!r} attention has no forward derivative. Load it "
                f"with attn_implementation={attention!r}."
            )
        lm.set_attn_implementation(attention)
    elif decoder.config._attn_implementation != attention:
        lm.set_attn_implementation(attention)


@contextmanager
def _eval_mode(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    """Every module in eval mode, each module's own flag restored.

    A layer checkpoints only while it is training itself: with ``checkpointing`` it stays so. Its
    own dropout rates are 0 meanwhile (its children are in eval mode), and its checkpoints are not
    reentrant, which is the kind that torch.autograd.grad can go through.
    """
    modules = list(model.modules())
    flags = [m.training for m in modules]
    replaced: list[tuple[nn.Module, str, Any]] = []

    def replace(module: nn.Module, name: str, value: Any) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        for module in modules:
            module.training = False
            layer = isinstance(module, GradientCheckpointingLayer)
            if checkpointing and layer and module.gradient_checkpointing:
                module.training = True
                checkpoint = module._gradient_checkpointing_func
                if getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
                    plain = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
                    replace(module, "_gradient_checkpointing_func", plain)
                for name, value in list(vars(module).items()):
                    if "dropout" in name and isinstance(value, float):
                        replace(module, name, 0.0)
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag
        for module, name, value in replaced:
            setattr(module, name, value)
