"""Objectives for ``Trainer(compute_loss_func=...)``, which is given finished logits."""

from typing import Any

import torch
from torch import Tensor, nn

from vcore_kernels import VcoreLoss, dft_loss, linear_nll, linear_nll_jvp, sft_loss, vcore_loss
from vcore_kernels.perturbed import NonFiniteDirectionError
from vcore_train.config import DEFAULT_KL_BUDGET, METHODS, VARIANCE_CONTROLS
from vcore_train.config_checks import check_number, option_error
from vcore_train.direction_states import DirectionState, EmaDirection, ProbeDirection
from vcore_train.direction_tensors import Direction, clip_direction, wide
from vcore_train.modeling import IGNORE_INDEX, Head, causal_lm, head_of
from vcore_train.parameter_choice import chosen_parameters
from vcore_train.random_labels import random_labels
from vcore_train.sharding import is_sharded

DIRECTIONS = ("previous", "batch", "ema")


def vcore_loss_func(model: nn.Module | None = None, **options: Any) -> "VcoreLossFunction":
    """A loss for any trainer that takes ``compute_loss_func``::

        model.config.output_hidden_states = True  # for method "vcore"
        Trainer(model, args, compute_loss_func=vcore_loss_func(model, kl_budget=0.02), ...)

    Arguments, limits and errors are those of :class:`VcoreLossFunction`.
    """
    return VcoreLossFunction(model, **options)


class VcoreLossFunction:
    """The loss of a batch out of its logits and labels.

    Such a function sees no parameters before the head, starts no probe, and does not know where an
    optimizer step ends. So it does less than :class:`vcore_train.VcoreMixin`, for which a trainer
    is subclassed:

    * ``"sft"``, ``"dft"`` and ``"random"`` are the same objectives.
    * ``"vcore"`` takes its utilities over the head alone (``direction_params="lm_head"`` there).
      They are exact: <g, grad l_t> over the head's weight needs the last hidden states and nothing
      else. g is the gradient of the uniform loss in the head: of the batch before
      (``"previous"``), of this one (``"batch"``, a part of which is each token's own gradient), or
      a running average (``"ema"``). The head has to be trained; with LoRA elsewhere there is
      nothing to probe.
    * Trajectories are rows: a packed one counts as one. Alpha is that of a call, so that 1 x 8 and
      4 x 2 examples differ. Each process has a g of its own, and checkpoints do not keep it.

    The trainer forms logits [B, T, V] and, for ``"vcore"``, keeps the hidden states of all layers;
    docs/trainers.md has figures. Each call takes 3 products of the head for the utilities and 3 for
    g, which has 4 bytes an entry of the head. Without gradients (evaluation) the loss is the
    uniform one.

    Args:
        model: the trained model, plain or PEFT-wrapped; only ``"vcore"`` needs it.
        method: ``"vcore"``, ``"sft"``, ``"dft"`` or ``"random"``.
        direction: ``"previous"``, ``"batch"`` or ``"ema"``. The first call without a g is uniform.
        ema_decay: in [0, 1), weight of the past in direction ``"ema"``.
        max_norm: clips each gradient to this norm; None does not.
        kl_budget, temperature, tau, variance_control, variance_cap, random_keep: as in
            :class:`vcore_train.VcoreOptions`.
        seed: of method ``"random"``.

    Attributes:
        last: :class:`vcore_kernels.VcoreLoss` of the latest weighted call; None before.

    Raises:
        ValueError: an option out of its range; a head that is frozen, sharded or carries an
            adapter. When called: no labels, no hidden states, or hidden states that the head does
            not turn into the logits.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        method: str = "vcore",
        direction: str = "previous",
        ema_decay: float = 0.9,
        max_norm: float | None = None,
        kl_budget: float | None = None,
        temperature: float | None = None,
        tau: float | None = None,
        variance_control: str = "utility",
        variance_cap: float | None = 1.0,
        random_keep: float = 0.2,
        seed: int = 0,
    ):
        for name, value, allowed in (
            ("method", method, METHODS),
            ("direction", direction, DIRECTIONS),
            ("variance_control", variance_control, VARIANCE_CONTROLS),
        ):
            if value not in allowed:
                raise option_error(_OWNER, name, value, "one of " + ", ".join(allowed))
        check_number(_OWNER, "random_keep", random_keep, low=0, low_open=True, high=1)
        check_number(_OWNER, "ema_decay", ema_decay, low=0, high=1, high_open=True)
        for name, bound in (("max_norm", max_norm), ("variance_cap", variance_cap)):
            if bound is not None:
                check_number(_OWNER, name, bound, low=0, low_open=True)
        self.model, self.method, self.direction = model, method, direction
        self.max_norm, self.random_keep, self.seed = max_norm, random_keep, seed
        self.variance_control, self.variance_cap = variance_control, variance_cap
        self.sharpness: dict[str, Any] = _sharpness(
            kl_budget=kl_budget, temperature=temperature, tau=tau
        )
        self.state: DirectionState = (
            EmaDirection(ema_decay) if direction == "ema" else ProbeDirection()
        )
        self.last: VcoreLoss | None = None
        self._calls = 0
        self._hidden_checked = False
        if method == "vcore":
            _check_model(model)

    def __call__(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Args: ``outputs.logits`` [B, T, V]; ``labels`` [B, T], not shifted, -100 where not
        supervised; the supervised tokens of the whole optimizer step, by default of this batch.
        """
        if labels is None:
            raise ValueError(
                f"{_OWNER}: the batch has no labels. Add `labels`, int64, shaped like input_ids, "
                "with -100 at tokens that are not supervised."
            )
        labels = labels.clone()
        labels[:, 0] = IGNORE_INDEX  # nothing predicts the first token
        training = torch.is_grad_enabled()
        if training and self.method == "random":
            labels = random_labels({"labels": labels}, self.random_keep, (self.seed, self._calls))
        self._calls += training
        mask = labels != IGNORE_INDEX
        num_items = mask.sum() if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(num_items, device=mask.device).clamp(min=1)
        nll = _nll(outputs.logits, labels)
        if training and self.method == "dft":
            return dft_loss(nll, mask=mask, num_items=num_items)
        utility = None
        if training and self.method == "vcore" and bool(mask.any()):
            utility = self._utility(outputs, labels)
        if utility is None:
            return sft_loss(nll, mask=mask, num_items=num_items)
        mode = self.variance_control
        if mode == "trajectory" and int(mask.any(-1).sum()) < 2:
            mode = "none"  # one trajectory has no variance over trajectories
        self.last = vcore_loss(
            nll,
            utility,
            mask=mask,
            variance_control=mode,
            cap=self.variance_cap,
            num_items=num_items,
            **self.sharpness,
        )
        return self.last.loss

    def _utility(self, outputs: Any, labels: Tensor) -> Tensor | None:
        """<g, grad l_t> over the head [B, T]; None while there is no g."""
        if getattr(outputs, "hidden_states", None) is None:
            raise ValueError(
                f"{_OWNER}: method='vcore' needs the hidden states, and the outputs have none. Set "
                "model.config.output_hidden_states = True."
            )
        assert self.model is not None
        hidden, head = outputs.hidden_states[-1].detach(), head_of(self.model)
        if not self._hidden_checked:
            _check_hidden(hidden, head, outputs.logits)
            self._hidden_checked = True
        g = self.state.tensors  # of the batches before
        try:
            self.state.update(clip_direction(head_gradient(hidden, head, labels), self.max_norm))
        except NonFiniteDirectionError:  # the average stays as it is
            return None
        g = g if self.direction == "previous" else self.state.tensors
        return head_utility(hidden, head, labels, g) if g else None


def head_gradient(hidden: Tensor, head: Head, labels: Tensor) -> Direction:
    """Gradient of the mean loss of the supervised tokens in the head, ``weight`` and ``bias``.

    ``hidden`` [B, T, H], ``labels`` [B, T] not shifted. Those of the two that require a gradient;
    fp32 (float64 for float64).
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in (("weight", head.weight), ("bias", head.bias))
        if value is not None and value.requires_grad
    }
    with torch.enable_grad():
        options = {**head.options(), "bias": leaves.get("bias", head.bias)}
        weight = leaves.get("weight", head.weight)
        nll = linear_nll(hidden, weight, labels, shift=1, ignore_index=IGNORE_INDEX, **options)
        gradients = torch.autograd.grad(nll.sum(), list(leaves.values()))
    count = (labels != IGNORE_INDEX).sum()
    pairs = zip(leaves, gradients, strict=True)
    return {name: gradient.to(wide(gradient)) / count for name, gradient in pairs}


def head_utility(hidden: Tensor, head: Head, labels: Tensor, g: Direction) -> Tensor:
    """``<g, grad l_t>`` over the head's parameters: [B, T], fp32, 0 where not supervised.

    What :func:`vcore_train.token_utilities` gives for a direction of the head alone, from hidden
    states [B, T, H] that are there already.
    """
    frozen = head.detach()
    _, utility = linear_nll_jvp(
        hidden,
        frozen.weight,
        labels,
        torch.zeros_like(hidden),
        g.get("weight"),
        bias_tangent=g.get("bias"),
        shift=1,
        ignore_index=IGNORE_INDEX,
        **frozen.options(),
    )
    return utility


# ---- what the function is made of ----

_OWNER = vcore_loss_func.__name__


def _sharpness(**values: float | None) -> dict[str, Any]:
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) > 1:
        came = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"{_OWNER}: pass at most one of tau, temperature and kl_budget, got {came}."
        )
    for name, value in given.items():
        check_number(_OWNER, name, value, low=0, low_open=name == "temperature")
    return given or {"kl_budget": DEFAULT_KL_BUDGET}


def _check_model(model: nn.Module | None) -> None:
    if model is None:
        raise ValueError(
            f"{_OWNER}: method='vcore' takes utilities over the head of the model. Pass the model."
        )
    if is_sharded(model):
        raise ValueError(
            f"{_OWNER}: the head of a sharded model is whole only within the model's own forward. "
            "Use VcoreMixin."
        )
    chosen_parameters(model, "lm_head")  # raises where it is frozen
    module: Any = causal_lm(model).get_output_embeddings()
    if head_of(model).weight is not module.weight:
        raise ValueError(
            f"{_OWNER}: the head carries an adapter. Leave lm_head out of target_modules, or use "
            "VcoreMixin, which probes adapters."
        )


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, T] losses in fp32, aligned with ``labels``, 0 where not supervised."""
    wide_logits = logits[:, :-1].to(wide(logits)).transpose(1, 2)
    nll = nn.functional.cross_entropy(
        wide_logits, labels[:, 1:], ignore_index=IGNORE_INDEX, reduction="none"
    )
    return nn.functional.pad(nll, (1, 0))


def _check_hidden(hidden: Tensor, head: Head, logits: Tensor) -> None:
    """Raises unless the head makes the first logits out of the hidden states."""
    rows, expected = hidden[:1, :4], logits[:1, :4].detach().float()
    with torch.no_grad():
        made = nn.functional.linear(rows.float(), head.weight.float()) * head.scale
        if head.bias is not None:
            made += head.bias.float() * head.scale
        if head.softcap is not None:
            made = head.softcap * torch.tanh(made / head.softcap)
        error = float((made - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if error > 0.05:
        raise ValueError(
            f"{_OWNER}: outputs.hidden_states[-1] is not what the head reads (relative difference "
            f"of the logits {error:.3g}). Use VcoreMixin for this architecture."
        )
