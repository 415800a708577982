"""Which parameters a direction moves: all that are trained, or a part of them."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from vcore_train.modeling import causal_lm, decoder_layers, head_of, trainable_parameters

Params = str | Sequence[str]
_LAST_LAYERS = re.compile(r"last_(\d+)_layers?")


def chosen_parameters(model: nn.Module, params: Params = "all") -> dict[str, nn.Parameter]:
    """The trainable parameters that ``params`` chooses, by name, in the model's order.

    Args:
        params: one of these, or several of them in a sequence.

            * ``"all"``: every parameter with ``requires_grad``, tied ones once.
            * ``"last_<k>_layers"``: those in the last k decoder layers (the final norm and the
              head are not in a layer).
            * ``"lm_head"``: the output head's. Where its weight is the input embeddings', this is
              *the head's use of it alone*, under the head's own name (``lm_head.weight``): the
              gradient through the logits only, and utilities as if the two were separate weights.
              The embeddings' own name stands for both uses.
            * a name, or an fnmatch pattern of names (``"*.layers.3.mlp.*"``). A pattern takes the
              trainable parameters among its matches, a name must be of a trainable one.

    Raises:
        ValueError: nothing is matched, or nothing trainable; more layers than the model has.
        TypeError: neither a string nor a sequence of strings.
    """
    items = [params] if isinstance(params, str) else list(params)
    wrong = [item for item in items if not isinstance(item, str)]
    if wrong:
        raise TypeError(
            f"descent_direction: params must be a string or several, got {type(wrong[0]).__name__}."
        )
    if not items:
        raise ValueError("descent_direction: params is empty. 'all' chooses every trained one.")
    own, every = _names(model)
    found = {name for item in items for name in _matched(model, item, own, every)}
    uses = {every[name] for name in found if name in own}
    return {
        name: p for name, p in every.items() if name in found and (name in own or p not in uses)
    }


def head_alone(model: nn.Module) -> str | None:
    """The name that stands for the head's use alone of the weight it shares with the embeddings.

    None where they are not tied.
    """
    own, every = _names(model)
    module, weight = causal_lm(model).get_output_embeddings(), head_of(model).weight
    prefix = next(
        (n for n, m in model.named_modules(remove_duplicate=False) if m is module), "lm_head"
    )
    for name, p in every.items():
        if p is weight and name not in own and name.startswith(f"{prefix}."):
            return name
    return None


def _names(model: nn.Module) -> tuple[set[str], dict[str, nn.Parameter]]:
    """The first name of each parameter, and all names."""
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name for name, _ in model.named_parameters()}, every


def _matched(model, item: str, own: set[str], every: dict[str, nn.Parameter]) -> set[str]:
    """Names of trainable parameters; the first name of each, or that of the head's use alone."""
    if item == "all":
        names = set(trainable_parameters(model))
        if not names:
            raise ValueError(
                "descent_direction: the model has no parameter with requires_grad, so nothing can "
                "descend."
            )
        return names
    alone = head_alone(model)
    if item == "lm_head":
        of_head = set(causal_lm(model).get_output_embeddings().parameters())
        shared = None if alone is None else every[alone]
        names = {n for n in own if every[n] in of_head and every[n] is not shared}
        names |= set() if alone is None else {alone}
    elif layers := _LAST_LAYERS.fullmatch(item):
        of_layers = set(_last_layers(model, item, int(layers[1])).parameters())
        names = {name for name in own if every[name] in of_layers}
    else:
        names = _by_pattern(item, own, every, alone)
    trainable = {name for name in names if every[name].requires_grad}
    if not trainable:
        raise ValueError(
            f"descent_direction: params={item!r} chooses "
            + (
                f"frozen parameters only ({some(sorted(names))})"
                if names
                else "no parameter at all"
            )
            + ". A step cannot move them, so a direction along them says nothing of training: "
            f"choose among the trained ones, whose names are like {_example(model)}, or set "
            "requires_grad before the optimizer is made."
        )
    return trainable


def _by_pattern(item, own, every, alone) -> set[str]:
    matches = [name for name in every if fnmatchcase(name, item)]
    first = {every[name]: name for name in own}
    # A pattern that matches both names of a tied weight means all its uses.
    return {
        name
        if name in own or (name == alone and first[every[name]] not in matches)
        else first[every[name]]
        for name in matches
    }


def _last_layers(model: nn.Module, item: str, count: int) -> nn.ModuleList:
    layers = decoder_layers(model)
    if not 1 <= count <= len(layers):
        raise ValueError(
            f"descent_direction: params={item!r}, but {type(causal_lm(model)).__name__} has "
            f"{len(layers)} layers. Pass last_1_layers to last_{len(layers)}_layers, or 'all'."
        )
    return nn.ModuleList(list(layers)[-count:])


def _example(model: nn.Module) -> str:
    return repr(next(iter(trainable_parameters(model)), None))


def some(names: Sequence[str], most: int = 5) -> str:
    """``names`` for a message, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
