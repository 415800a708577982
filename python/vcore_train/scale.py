"""What a step holds in memory and sends, on paper, for a model sharded by FSDP2.

All figures are bytes a rank. tests/train/test_scale.py holds them against what is allocated and
sent on 1, 2 and 4 ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from vcore_train.modeling import causal_lm, decoder_layers


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together.

    Attributes:
        parameters, trained: entries.
        kept: it stays gathered from its forward to its backward, as accelerate keeps the final norm
            and the head.
        in_backward: its outputs need a gradient, so that its weights are needed in the backward.
    """

    parameters: int
    trained: int
    kept: bool = False
    in_backward: bool = True


def units_of(model: nn.Module) -> list[Unit]:
    """Those of ``model`` (it may be on the meta device) as accelerate 1.15 makes them.

    These are the embeddings, every decoder layer, and the final norm with the head; where the
    embeddings are the head's weight, they belong to the last. A LoRA adapter is in the unit of the
    layer that it is on.
    """
    lm = causal_lm(model)
    embeddings: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    layers = list(decoder_layers(model))
    in_layers = {p for layer in layers for p in layer.parameters()}
    tied = embeddings.weight is head.weight
    first = set() if tied else set(embeddings.parameters())
    tail = {p for p in model.parameters() if p not in in_layers and p not in first}
    units = [] if tied else [_unit(first, in_backward=any(p.requires_grad for p in first))]
    units += [_unit(set(layer.parameters())) for layer in layers]
    return [*units, _unit(tail, kept=True)]


def _unit(parameters: set[nn.Parameter], **kind: bool) -> Unit:
    return Unit(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        **kind,
    )


@dataclass(frozen=True)
class Precision:
    """Bytes of an entry."""

    trained: int = 4  # of the master weights of what is trained
    frozen: int = 2
    compute: int = 2  # of gathered weights and tangents
    reduced: int = 4  # of gradients while they are summed over the ranks
    moments: int = 8  # both of Adam's
    state: int = 4  # of a gradient, and of the direction


@dataclass(frozen=True)
class Memory:
    """What a rank holds, bytes. The first five fall as 1 / ranks.

    Attributes:
        weights: master weights of what is trained, and frozen ones.
        moments: of the optimizer.
        gradients: of the training pass or of the probe, which are not there at once.
        direction: g, or its average.
        tangents: g beside its average while an average takes an update in or is preconditioned; 0
            with direction "probe".
        gathered: the largest weights and tangents that are whole at once.
        activations: of the training pass with gradient checkpointing.
    """

    weights: float
    moments: float
    gradients: float
    direction: float
    tangents: float
    gathered: float
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Traffic:
    """What a rank receives in an optimizer step, bytes (ring algorithms)."""

    weights: float  # gathered in forward and backward passes
    tangents: float  # gathered in the dual pass
    gradients: float  # reduced and scattered

    @property
    def total(self) -> float:
        return self.weights + self.tangents + self.gradients


def memory(
    units: Sequence[Unit],
    ranks: int,
    *,
    precision: Precision = Precision(),
    method: str = "vcore",
    averaged: bool = False,
    activations: float = 0.0,
) -> Memory:
    """The peak of a step on ``ranks``; the arguments as in the command ``vcore scale``."""
    p, entries = precision, sum(u.parameters for u in units)
    trained = sum(u.trained for u in units)
    probing = method == "vcore"
    return Memory(
        weights=(trained * p.trained + (entries - trained) * p.frozen) / ranks,
        moments=trained * p.moments / ranks,
        gradients=trained * p.state / ranks,
        direction=trained * p.state / ranks if probing else 0.0,
        tangents=trained * p.state / ranks if probing and averaged else 0.0,
        gathered=_gathered(units, ranks, p, probing),
        activations=activations,
    )


def _gathered(units: Sequence[Unit], ranks: int, p: Precision, probing: bool) -> float:
    """The kept unit, and of the others' three times the largest: gathered weights, the message
    that they came in, and one that is on its way. In the dual pass the same of tangents, in a
    backward pass gradients before and while they are reduced.
    """
    if ranks == 1:
        return 0.0
    kept = sum(u.parameters + u.trained * probing for u in units if u.kept) * p.compute
    other = [u for u in units if not u.kept]
    whole = max((u.parameters for u in other), default=0) * p.compute
    tangent = max((u.trained for u in other), default=0) * p.compute * probing
    gradient = max((u.trained for u in units), default=0) * p.reduced
    return kept + 3 * whole + max(3 * tangent, 2 * gradient)


def traffic(
    units: Sequence[Unit],
    ranks: int,
    *,
    precision: Precision = Precision(),
    method: str = "vcore",
    every: int = 1,
    micro_batches: int = 1,
) -> Traffic:
    """What a step's passes send, on average over ``every`` steps of one direction.

    A training pass gathers every unit forward and, unless it is kept, backward, and reduces the
    gradients (once a step: between micro-batches they stay unreduced). So does a probe for each of
    its batches, of which a step has one. The dual pass gathers weights and tangents once.
    """
    p, share = precision, (ranks - 1) / ranks
    once = sum(u.parameters for u in units) * p.compute
    again = sum(u.parameters for u in units if not u.kept and u.in_backward) * p.compute
    trained = sum(u.trained for u in units)
    probes = 1 / every if method == "vcore" else 0.0
    duals = micro_batches if method == "vcore" else 0
    return Traffic(
        weights=share * ((micro_batches + probes) * (once + again) + duals * once),
        tangents=share * duals * trained * p.compute,
        gradients=share * (1 + probes) * trained * p.reduced,
    )


def activations(
    config: Any, tokens: int, *, compute: int = 2, context_ranks: int = 1
) -> dict[str, float]:
    """Activations of a rank with gradient checkpointing, bytes, for ``tokens`` a micro-batch.

    An estimate, not measured: the hidden states between layers; one layer's own while its backward
    runs, 10 H and 3 times the width of the MLP a token, with attention that stores no matrix; in
    the dual pass, where nothing is kept between layers, values and tangents of what one layer has
    alive at once, 6 H and 3 times the width. ``context_ranks`` share the tokens.
    """
    own, hidden, width = tokens / context_ranks, config.hidden_size, config.intermediate_size
    return {
        "between layers": own * compute * hidden * config.num_hidden_layers,
        "of a layer": own * compute * (10 * hidden + 3 * width),
        "of the dual pass": 2 * own * compute * (6 * hidden + 3 * width),
    }


def empty_model(config: Any, lora_rank: int = 0) -> nn.Module:
    """A causal LM of ``config`` without storage, with a LoRA adapter on every linear layer if
    ``lora_rank`` is not 0."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        if lora_rank:
            lora = LoraConfig(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
            return get_peft_model(model, lora)
    return model


COLUMNS = (
    "GPUs",
    "weights",
    "moments",
    "grads",
    "g",
    "gathered",
    "activ.",
    "total",
    "SFT sends",
    "VCORE",
)


def table(
    config: Any,
    ranks: Sequence[int],
    tokens: int,
    *,
    lora_rank: int = 0,
    averaged: bool = False,
    every: int = 1,
    context_ranks: int = 1,
) -> list[list[str]]:
    """Rows of ``vcore scale``: for each number of ranks the parts of :class:`Memory` in GB (1e9
    bytes) and their sum, and what a step receives by SFT and by VCORE."""
    units = units_of(empty_model(config, lora_rank))
    parts = activations(config, tokens, context_ranks=context_ranks)
    held = max(parts["between layers"] + parts["of a layer"], parts["of the dual pass"])
    rows = []
    for number in ranks:
        of = memory(units, number, averaged=averaged, activations=held)
        figures = [
            of.weights,
            of.moments,
            of.gradients,
            of.direction + of.tangents,
            of.gathered,
            of.activations,
            of.total,
            traffic(units, number, method="sft").total,
            traffic(units, number, every=every).total,
        ]
        rows.append([str(number), *(f"{figure / 1e9:.1f}" for figure in figures)])
    return rows
