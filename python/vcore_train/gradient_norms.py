"""How large each response's gradient is: G of GVM, for a whole batch from one pass.

The gradient of ``sum_t log p(y_t)`` by a linear layer's weight is ``sum_t d_t x_t'`` over the
response's tokens. One backward pass of the summed losses of all responses gives every d_t, since
no response depends on another, and the norms follow without a gradient for each of them.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vcore_kernels import weighted_linear_nll
from vcore_kernels.backends.reference import without_autocast
from vcore_train.head_check import verify_head
from vcore_train.modeling import (
    IGNORE_INDEX,
    HeadPart,
    causal_lm,
    head_of,
    head_parts,
    hidden_states,
    input_embeddings,
    label_shift,
    probing,
    supervised_labels,
)
from vcore_train.parameter_uses import LinearUse, LookupUse, ParameterUses
from vcore_train.sequence_squares import (
    HeadPass,
    Lookup,
    head_squares,
    head_squares_one_by_one,
    linear_squares,
    lookup_squares,
    row_sums,
    tied_products,
)
from vcore_train.sequences import Sequences

__all__ = ["sequence_grad_norms"]


def sequence_grad_norms(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    params: str | Sequence[str] = "embeddings",
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """``|| grad_W sum_t log p(y_t) ||_F`` of every response, W chosen by ``params``.

    The sum is over the supervised tokens of the response, W may be several parameters: the norm is
    then that of all their entries. Dropout is off, and model and random number generators are as
    before on return. Autocast is the caller's: the passes compute as in training, what is made of
    them in float32.

    Cost: one forward pass, and but for an output head alone one backward pass that forms no
    weight gradients. On top of these, for B sequences of T tokens: embeddings, a sum of B*T x H
    values; an output head, what :func:`vcore_kernels.linear_nll_grad_norms` costs, and where input
    and output share their weight two products of T x T x H a sequence; a linear layer, the cheaper
    of T x in x out (its gradient) and T x T x (in + out) (the ghost norm) a sequence. Memory beyond
    the graph's: the layer's in x out or T x T entries for one sequence at a time (for several while
    that is small), and for embeddings some of B*T x H. A head with adapters or of which the bias is
    chosen takes a V x H gradient for each sequence. Gradient checkpointing stays as it is.

    Args:
        model: a causal LM of transformers, plain or PEFT-wrapped. Nothing needs ``requires_grad``.
        inputs: a batch with ``labels`` [B, T], padded on either side or packed
            (``cu_seq_lens_q`` or restarting ``position_ids``).
        params: what W is.

            - "embeddings": the input embeddings' weight.
            - "lm_head": the output head's weight. Where it is tied to the input embeddings, both
              names mean the one matrix, whose gradient is the sum over its two uses.
            - "all-linear": weights and biases of every ``torch.nn.Linear`` in the model except the
              output head and the adapters on it. Adapters' matrices and the frozen layers under
              them are in; embeddings, norms, quantised weights and layers of other classes
              (experts in one tensor, GPT-2's Conv1D) are out.
            - names as in ``model.named_parameters()``, of weights and biases of linear layers and
              weights of embeddings, frozen or not. Of a LoRA model, what is being trained:
              ``[n for n, p in model.named_parameters() if p.requires_grad]``.
        temperature: log-probabilities are those of sampling at this temperature.
        backend: of the head operators of vcore_kernels.

    Returns:
        [B], or [S] for S packed sequences, in their order; nats per unit of W. float32, float64 for
        a float64 model. 0 for a response without a supervised token, and for a parameter that the
        pass does not use (an expert that no token went to).

    Raises:
        ValueError: unknown names, quantised parameters, parameters that are used as something else
            than a linear layer's or an embedding's, layers that mix up the batch's tokens, no
            labels.
        TypeError: a model that is no causal LM of transformers.

    Source: G of GVM (arXiv 2505.02391). Norms from inputs and output gradients: Goodfellow (arXiv
    1510.01799); for sequences, the ghost norm: Li et al. (arXiv 2110.05679, section 4).
    """
    if torch.is_inference_mode_enabled():  # its tensors cannot be saved for a backward pass
        with torch.inference_mode(False):
            inputs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if not label_shift(inputs):
        raise ValueError(
            "sequence_grad_norms: the batch has shift_labels, so it is a part of sequences that "
            "several processes share. Pass whole ones, with labels."
        )
    labels = supervised_labels(inputs)
    chosen = norm_parameters(model, params)
    verify_head(model)
    parts = [part for part in head_parts(model) if part.parameter in chosen]
    # The gradient of a head that is nothing else takes no backward pass, and so no graph.
    embedding: Any = input_embeddings(model)
    only_head = {part.parameter for part in parts} == set(chosen) and embedding not in chosen
    sequences = Sequences.of(inputs)
    squares = _Squares(sequences, chosen)
    uses = ParameterUses(chosen, squares.arrived)
    with torch.inference_mode(False), probing(model, attention=None, checkpointing=True):
        with uses.recomputed(model), torch.set_grad_enabled(not only_head):
            with uses:
                hidden = hidden_states(model, inputs)
            if uses.counts.get(embedding) == 0:
                raise ValueError(
                    f"sequence_grad_norms: the pass looks nothing up in {chosen[embedding]}. Pass "
                    "input_ids, not inputs_embeds."
                )
            head = head_of(model).detach().tempered(temperature)
            loss, nll = weighted_linear_nll(
                hidden,
                head.weight,
                labels,
                torch.ones(labels.shape, device=labels.device),
                shift=1,
                ignore_index=IGNORE_INDEX,
                backend=backend,
                **head.options(),
            )
            if loss.requires_grad:
                with without_autocast(loss.device.type):
                    torch.autograd.grad(loss, uses.anchor, allow_unused=True)
        with torch.no_grad():
            return squares.norms(parts, HeadPass(head, hidden, labels, nll, sequences, backend))


class _Squares:
    """Squares [S] of the norms, gathered while the backward pass runs."""

    def __init__(self, sequences: Sequences, chosen: Mapping[nn.Parameter, str]):
        self.sequences, self.names = sequences, chosen
        self.squares: list[Tensor] = []
        self.multiplied: set[nn.Parameter] = set()  # weights of linear layers
        # What has to wait until every use of the parameter is known.
        self.shared: dict[nn.Parameter, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.lookups: dict[nn.Parameter, list[Lookup]] = defaultdict(list)
        self.biases: dict[nn.Parameter, Tensor] = {}

    def arrived(self, use: LinearUse | LookupUse) -> None:
        if isinstance(use, LookupUse):
            tokens = self._flat(use.weight, use.tokens.unsqueeze(-1))[:, 0]
            gradient = self._flat(use.weight, use.gradient)
            self.lookups[use.weight].append(Lookup(tokens, gradient))
            return
        named = use.weight if use.weight is not None else use.bias
        rows, gradient = self._flat(named, use.input), self._flat(named, use.gradient)
        if use.bias is not None:
            sums = row_sums(gradient, self.sequences)
            self.biases[use.bias] = self.biases.get(use.bias, 0) + sums
        if use.weight is not None:
            self.multiplied.add(use.weight)
            if use.only:
                self.squares.append(linear_squares([(rows, gradient)], self.sequences))
            else:
                self.shared[use.weight].append((rows, gradient))

    def _flat(self, parameter: nn.Parameter | None, values: Tensor) -> Tensor:
        """[..., features] over the batch's tokens as [N, features]."""
        if values.shape[:-1] not in (self.sequences.shape, (self.sequences.tokens,)):
            assert parameter is not None
            raise ValueError(
                f"sequence_grad_norms: {self.names[parameter]} is applied to {list(values.shape)}, "
                f"not to one row for each token of the batch {list(self.sequences.shape)}, so that "
                "its rows cannot be told apart by response. Leave it out of params."
            )
        return values.reshape(self.sequences.tokens, values.shape[-1])

    def norms(self, parts: Sequence[HeadPart], head: HeadPass) -> Tensor:
        """[S], of everything together, when the backward pass is over."""
        mixed = self.multiplied & {*self.lookups, *(part.parameter for part in parts)}
        if mixed:
            raise ValueError(
                f"sequence_grad_norms: {self.names[mixed.pop()]} is a linear layer's weight and "
                "that of an embedding or the output head, too. Leave it out of params."
            )
        sequences, squares = self.sequences, [*self.squares]
        squares += [linear_squares(uses, sequences) for uses in self.shared.values()]
        squares += [sums.square().sum(1) for sums in self.biases.values()]
        if parts:
            squares.append(self._head(parts, head))
        squares += [lookup_squares(lookups, sequences) for lookups in self.lookups.values()]
        total = head.nll.new_zeros(sequences.number)
        for square in squares:
            total += square.to(total)
        return total.clamp_min_(0).sqrt_()  # a sum that cancels may have been rounded below 0

    def _head(self, parts: Sequence[HeadPart], head: HeadPass) -> Tensor:
        lookups = self.lookups.pop(parts[0].parameter, [])
        whole = slice(0, head.head.weight.shape[1])
        if [part.columns for part in parts] != [whole]:
            return head_squares_one_by_one(head, parts, lookups)
        squares = head_squares(head)
        if lookups:
            squares = squares + lookup_squares(lookups, self.sequences)
        for lookup in lookups:
            squares = squares + 2 * tied_products(head, lookup)
        return squares


def norm_parameters(model: nn.Module, params: str | Sequence[str]) -> dict[nn.Parameter, str]:
    """The parameters that ``params`` means, with their names, tied ones once.

    Args, errors: as for :func:`sequence_grad_norms`.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[nn.Parameter, str] = {}
    for name, parameter in named.items():
        names_of.setdefault(parameter, name)
    if isinstance(params, str):
        if params not in _CHOICES:
            raise ValueError(
                f"sequence_grad_norms: unknown params {params!r}, expected one of "
                f"{', '.join(map(repr, _CHOICES))}, or a list of parameter names."
            )
        chosen = _CHOICES[params](model)
        composed = [p for p in chosen if p not in names_of]
        if composed:
            raise ValueError(
                f"sequence_grad_norms: the weight of {params!r} is no parameter but made from "
                "several, as by PEFT's trainable tokens. Choose other layers by name."
            )
    else:
        if not params:
            raise ValueError("sequence_grad_norms: params is empty; name a parameter at least.")
        unknown = [name for name in params if name not in named]
        if unknown:
            raise ValueError(
                f"sequence_grad_norms: {', '.join(map(str, unknown[:5]))} are no parameters of "
                f"{type(model).__name__}, whose names are like {next(iter(named))!r}. Take names "
                "from model.named_parameters() of the model in the same wrapping."
            )
        chosen = [named[name] for name in params]
    quantised = [names_of[p] for p in chosen if not p.is_floating_point()]
    if quantised:
        raise ValueError(
            f"sequence_grad_norms: {', '.join(quantised[:5])} are quantised and have no gradient. "
            "Name the LoRA adapters over them."
        )
    return {p: names_of[p] for p in chosen}


def _all_linear(model: nn.Module) -> list[nn.Parameter]:
    of_head = {part.parameter for part in head_parts(model)}
    of_head |= set(causal_lm(model).get_output_embeddings().parameters())
    return [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
        if parameter not in of_head and parameter.is_floating_point()
    ]


_CHOICES: dict[str, Callable[[nn.Module], list[Any]]] = {
    "embeddings": lambda model: [input_embeddings(model)],
    "lm_head": lambda model: [head_parts(model)[0].parameter],
    "all-linear": _all_linear,
}
