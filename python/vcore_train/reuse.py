"""One forward pass for both: the dual pass that gives utilities serves as the main forward, too.

The ordinary step runs the model forward twice, once with tangents for the utilities and once with a
graph for the gradients. Where dropout is off the values of both are the same, and one is enough.
With F the cost of a plain forward pass, LoRA (whose backward pass costs about F, and whose dual
pass about 2 F):

=====================  ======  ===========  ============
step                   SFT     VCORE        with reuse
=====================  ======  ===========  ============
plain                  2 F     4 F          3 F
checkpointed layers    3 F     5 F          4 F
=====================  ======  ===========  ============

(Training all parameters, dual and backward pass cost a further F each.)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vcore_kernels import linear_nll, weighted_linear_nll
from vcore_kernels.weighted_linear_nll import weighted_sum
from vcore_train.head_check import verify_head
from vcore_train.modeling import (
    IGNORE_INDEX,
    causal_lm,
    check_packing,
    head_of,
    hidden_states,
    label_shift,
    supervised_labels,
)
from vcore_train.sharding import is_sharded
from vcore_train.utilities import DualPass, dual_pass, match_direction, utilities_of

__all__ = ["ForwardWithUtilities", "forward_with_utilities"]

Outputs = dict[Any, list[Tensor]]  # of each layer, call by call

_ROWS = 4096  # rows of a product with the tangents that are widened together


def forward_with_utilities(
    model: nn.Module,
    inputs: Mapping[str, Any],
    direction: Mapping[str, Tensor],
    *,
    backend: str = "auto",
) -> "ForwardWithUtilities":
    """The utilities ``s_t = <g, grad l_t>`` of a batch, and the forward pass to train it by.

    In a loop without accumulation::

        forward = forward_with_utilities(model, batch, direction)
        weights = vcore_loss(...).weights  # of forward.nll and forward.utility
        forward.loss(weights / num_items).backward()

    The gradients are those of ``sum weights * token_nll(model, batch)``. Two ways, by whether
    gradient checkpointing is on (its flag on the model's layers):

    * Without it the dual pass records the graph of an ordinary forward pass; tangents have none.
      Memory: the activations of an ordinary forward pass, kept from here to ``backward``. During
      this call the tangents of what PyTorch's own operations save come on top, at most as much
      again.
    * With it the dual pass keeps the output of every layer [B, T, H]; :meth:`~
      ForwardWithUtilities.loss` does not run these layers again, and ``backward`` recomputes each
      from what the one before it gave. Memory: as with checkpointing, kept from here on.

    Weights of an optimizer step may need the utilities of all its micro-batches. Then all their
    graphs or checkpoints exist at once, and accumulation saves no activation memory (with
    checkpointing it still saves that of a layer's recomputation).

    A frozen head costs two products of N x V x H in all, where the ordinary step has four: the rows
    d nll / d hidden [B, T, H] are kept, and give the utilities first and the gradients later.

    Args:
        model, inputs, direction, backend: as for :func:`vcore_train.token_utilities`, method "jvp".
            ``backward`` must come before the parameters change. Autocast is the caller's, here as
            in :meth:`~ForwardWithUtilities.loss`.

    Raises:
        ValueError: dropout in the model (its two passes would differ), float16 parameters (their
            gradients need a loss scale that does not exist yet), and what token_utilities raises.
        ForwardDerivativeError, NonFiniteDirectionError: as in token_utilities.
    """
    labels = supervised_labels(inputs)
    check_packing(inputs)
    check_reusable(model)
    probed = match_direction(model, direction)
    verify_head(model)
    layers = checkpointed_layers(model)
    with torch.inference_mode(False), torch.set_grad_enabled(not layers):
        if layers:
            with _recorded(layers) as outputs:
                dual = dual_pass(model, inputs, probed)
            return ForwardWithUtilities(model, inputs, labels, dual, outputs, backend)
        dual = dual_pass(model, inputs, probed, graph=True)
        return ForwardWithUtilities(model, inputs, labels, dual, None, backend)


class ForwardWithUtilities:
    """What :func:`forward_with_utilities` returns; :meth:`loss` may be called once.

    Attributes:
        utility: [B, T] in nats per unit of g, fp32, aligned with the labels, 0 if not supervised.
        nll: [B, T] in nats, the same; both without a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labels: Tensor,
        dual: DualPass,
        outputs: Outputs | None,
        backend: str,
    ):
        self._model, self._inputs, self._labels, self._backend = model, inputs, labels, backend
        self._outputs, self._shift = outputs, label_shift(inputs)
        self._hidden: Tensor | None = dual.hidden
        self._rows: Tensor | None = None
        moves = dual.weight_tangent is not None or dual.bias_tangent is not None
        trains = any(p.requires_grad for p in causal_lm(model).get_output_embeddings().parameters())
        self.utility: Tensor
        self.nll: Tensor
        if moves or trains:
            with torch.no_grad():
                self.utility, self.nll, *_ = utilities_of(dual, labels, self._shift, backend)
        else:
            self._keep_rows(dual)

    def _keep_rows(self, dual: DualPass) -> None:
        """Losses, the rows d nll / d hidden, and the utilities as their products with tangents."""
        with torch.enable_grad():
            hidden = dual.hidden.detach().requires_grad_()
            nll = linear_nll(
                hidden,
                dual.head.weight,
                self._labels,
                ignore_index=IGNORE_INDEX,
                shift=self._shift,
                backend=self._backend,
                **dual.head.options(),
            )
            (rows,) = torch.autograd.grad(nll.sum(), hidden)
        self.nll, self._rows = nll.detach(), rows
        products = [
            torch.linalg.vecdot(row.to(nll.dtype), tangent.to(nll.dtype))
            for row, tangent in zip(
                rows.flatten(0, 1).split(_ROWS),
                dual.hidden_tangent.flatten(0, 1).split(_ROWS),
                strict=True,
            )
        ]
        utility = torch.cat(products).view(rows.shape[:2])
        utility = F.pad(utility, (self._shift, 0))[:, : rows.shape[1]]
        self.utility = utility.where(self._labels != IGNORE_INDEX, 0) / dual.scale

    def loss(self, token_weight: Tensor) -> Tensor:
        """``sum token_weight * nll``, 0-dim, for ``backward``. No gradient reaches the weights.

        Args:
            token_weight: [B, T] like the labels: alpha * q * n / num_items.

        Raises:
            ValueError: a second call, or a weight of another shape.
        """
        if self._hidden is None:
            raise ValueError(
                "ForwardWithUtilities: loss was called before, and its graph is given away. Call "
                "forward_with_utilities again."
            )
        if token_weight.shape != self._labels.shape:
            raise ValueError(
                f"ForwardWithUtilities: token_weight has shape {list(token_weight.shape)}, the "
                f"labels {list(self._labels.shape)}. Pass one weight for each label."
            )
        token_weight = token_weight.detach().to(self.nll.dtype)
        hidden, rows, outputs = self._hidden, self._rows, self._outputs
        self._hidden = self._rows = self._outputs = None
        with torch.inference_mode(False), torch.enable_grad():
            if outputs is not None:
                hidden = _through_stored_layers(self._model, self._inputs, outputs)
            if rows is not None:
                return _WeightedRows.apply(hidden, rows, self.nll, token_weight, self._shift)
            head = head_of(self._model)
            loss, _ = weighted_linear_nll(
                hidden,
                head.weight,
                self._labels,
                token_weight,
                ignore_index=IGNORE_INDEX,
                shift=self._shift,
                backend=self._backend,
                **head.options(),
            )
            return loss


def check_reusable(model: nn.Module) -> None:
    """Raises ValueError where one forward pass cannot serve both, with what to change."""
    if is_sharded(model):
        raise ValueError(
            "reuse_forward: the model is sharded, and FSDP's hooks for the backward pass have no "
            "forward derivative. Leave reuse_forward off."
        )
    for name, module in model.named_modules():
        rate = _dropout_rate(module)
        if rate is not None:
            raise ValueError(
                f"reuse_forward: {name or 'the model'} ({type(module).__name__}) has "
                f"{rate[0]}={rate[1]}. Utilities are taken without dropout, so the training pass "
                "must be a second one. Set every dropout of the model (LoRA's too) to 0, or leave "
                "reuse_forward off."
            )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"reuse_forward: {name} is float16. Gradients in float16 need a loss scale in the "
                "forward pass of the head already. Train in bfloat16 or float32, or leave "
                "reuse_forward off."
            )


def _dropout_rate(module: nn.Module) -> tuple[str, float] | None:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return ("p", module.p) if module.p > 0 else None
    for name, value in vars(module).items():
        random = "dropout" in name or "layerdrop" in name or "jitter" in name
        if random and isinstance(value, float) and value > 0:
            return name, value
    return None


# ---- with checkpointed layers ----


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that gradient checkpointing recomputes, outermost ones, in order."""
    found: list[GradientCheckpointingLayer] = []
    inner: set[nn.Module] = set()
    for module in causal_lm(model).get_decoder().modules():
        checkpointed = isinstance(module, GradientCheckpointingLayer)
        if checkpointed and module.gradient_checkpointing and module not in inner:
            found.append(module)
            inner.update(module.modules())
    return found


@contextmanager
def _recorded(
    layers: list[GradientCheckpointingLayer],
) -> Iterator[Outputs]:
    """What each of ``layers`` puts out inside, call by call, without tangents."""
    outputs: Outputs = {layer: [] for layer in layers}

    def record(layer: Any, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"reuse_forward: {type(layer).__name__} returns {type(output).__name__}, and only "
                "layers that return one tensor can be taken from the dual pass. Leave "
                "reuse_forward or gradient checkpointing off."
            )
        outputs[layer].append(fwAD.unpack_dual(output).primal.detach())

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _through_stored_layers(model: nn.Module, inputs: Mapping[str, Any], outputs: Outputs) -> Tensor:
    """Hidden states [B, T, H] with a graph; the layers give what is stored in ``outputs``."""
    before = {layer: (layer._gradient_checkpointing_func, layer.training) for layer in outputs}
    try:
        for layer, stored in outputs.items():
            layer._gradient_checkpointing_func = partial(_stored_layer, layer, stored)
            layer.training = True  # a layer checkpoints only while it is training
        hidden = hidden_states(model, inputs)
    finally:
        for layer, (checkpoint, training) in before.items():
            layer._gradient_checkpointing_func, layer.training = checkpoint, training
    if any(outputs.values()):
        raise RuntimeError("reuse_forward: the layers ran less often than in the dual pass.")
    return hidden


def _stored_layer(layer: nn.Module, stored: list[Tensor], run: Callable, *args: Any) -> Tensor:
    """In the place of ``torch.utils.checkpoint.checkpoint(run, *args)``."""
    hidden, *others = args
    keywords = getattr(run, "keywords", {})
    if any(isinstance(x, Tensor) and x.requires_grad for x in (*others, *keywords.values())):
        raise ValueError(
            f"reuse_forward: {type(layer).__name__} takes gradients to more than its first "
            "argument. Leave reuse_forward or gradient checkpointing off."
        )
    parameters = [p for p in layer.parameters() if p.requires_grad]
    call = partial(_call, run, others)
    return _StoredLayer.apply(call, stored.pop(0), _autocast_now(hidden), hidden, *parameters)


def _call(run: Callable, others: list[Any], hidden: Tensor) -> Tensor:
    return run(hidden, *others)


def _autocast_now(tensor: Tensor) -> torch.autocast:
    device = tensor.device.type
    return torch.autocast(
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
        torch.is_autocast_cache_enabled(),
    )


class _StoredLayer(torch.autograd.Function):
    """A layer whose output is known: backward computes it again, with a graph, from its input."""

    @staticmethod
    def forward(ctx, call, stored, autocast, hidden, *parameters):
        ctx.call, ctx.autocast = call, autocast
        ctx.save_for_backward(hidden, *parameters)
        return stored.view_as(stored)

    @staticmethod
    def backward(ctx, grad_output):
        hidden, *parameters = ctx.saved_tensors
        needs_hidden = ctx.needs_input_grad[3]
        with torch.enable_grad(), ctx.autocast:
            hidden = hidden.detach().requires_grad_(needs_hidden)
            output = ctx.call(hidden)
        wanted = [hidden, *parameters] if needs_hidden else parameters
        grads = torch.autograd.grad(output, wanted, grad_output, allow_unused=True)
        return None, None, None, *(() if needs_hidden else (None,)), *grads


# ---- the head ----


class _WeightedRows(torch.autograd.Function):
    """``sum token_weight * nll``, where the rows d nll / d hidden are known."""

    @staticmethod
    def forward(ctx, hidden, rows, nll, token_weight, shift):
        ctx.shift = shift
        ctx.save_for_backward(rows, token_weight)
        return weighted_sum(token_weight, nll)

    @staticmethod
    def backward(ctx, grad_output):
        rows, token_weight = ctx.saved_tensors
        # The loss of label t is the row of the token before it, unless labels are shifted already.
        factor = F.pad(token_weight[:, ctx.shift :], (0, ctx.shift)) * grad_output
        return (rows * factor[..., None]).to(rows.dtype), None, None, None, None
