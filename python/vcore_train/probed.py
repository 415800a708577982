"""What a probe takes and gives: parameters with their direction, utilities with their losses."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vcore_train.direction_tensors import check_finite
from vcore_train.modeling import causal_lm
from vcore_train.parameter_choice import head_alone, some
from vcore_train.sharding import vocabulary_parallel


class TokenUtilities(NamedTuple):
    """Both shaped and aligned like the labels, fp32 (float64 for a float64 model)."""

    utility: Tensor  # [B, T], 0 where not supervised
    nll: Tensor  # [B, T] in nats, without dropout, 0 where not supervised
    epsilon: float | None = None  # the step that a difference took
    snr: float | None = None  # of a difference, see vcore_train.differences; None: not measured


class Probed(NamedTuple):
    """A parameter and its direction, of the same shape, on the same device."""

    parameter: nn.Parameter
    direction: Tensor
    moves: bool  # the direction is not zero
    of_head: bool  # it is in the head, and may be in the embeddings too
    # What of the head's it is, "weight" or "bias", where it does not move in the model but its
    # direction goes to the head's operators: of a weight that is shared with the embeddings the
    # head's use alone, and a head sharded along the vocabulary.
    of_operator: str | None = None


def match_direction(model: nn.Module, direction: Mapping[str, Tensor]) -> dict[str, Probed]:
    """``direction`` beside the parameters it moves, by name.

    The head's own name of a weight that it shares with the embeddings stands for the head's use
    alone (see :func:`vcore_train.parameter_choice.chosen_parameters`).

    Raises ValueError for an empty direction, names or shapes that the model does not have, a tied
    parameter under two names, quantised and frozen parameters; NonFiniteDirectionError with the
    count of NaN and inf entries.
    """
    if not direction:
        raise ValueError(
            "token_utilities: the direction is empty. descent_direction(model, batches) makes one; "
            "the model must have parameters with requires_grad."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in direction if name not in parameters]
    if unknown:
        raise ValueError(
            f"token_utilities: {some(unknown)} in the direction are no parameters of "
            f"{type(model).__name__}, whose names are like {next(iter(parameters))!r}. Make the "
            "direction with the model in the same wrapping (PEFT, DDP, torch.compile each add a "
            "prefix)."
        )
    wrong = [
        f"{name}: {list(g.shape)} for {list(parameters[name].shape)}"
        for name, g in direction.items()
        if g.shape != parameters[name].shape
    ]
    if wrong:
        raise ValueError(
            f"token_utilities: shapes in the direction differ from the model's: {some(wrong)}. "
            "Make the direction again after resizing the vocabulary or changing the adapter's rank."
        )
    quantised = [name for name in direction if not parameters[name].is_floating_point()]
    if quantised:
        raise ValueError(
            f"token_utilities: {some(quantised)} are quantised ({parameters[quantised[0]].dtype}) "
            "and cannot move. Probe the LoRA adapters over them: leave every quantised weight out "
            "of the direction."
        )
    names: dict[nn.Parameter, str] = {}
    for name in direction:
        twin = names.setdefault(parameters[name], name)
        if twin != name:
            raise ValueError(
                f"token_utilities: {twin} and {name} are one tied parameter. Pass it once, with "
                "the sum of the gradients of both uses."
            )
    frozen = [name for name in direction if not parameters[name].requires_grad]
    if frozen:
        raise ValueError(
            f"token_utilities: {some(frozen)} are frozen, so training never steps along their "
            "direction and a utility along it says nothing. Leave them out of the direction, as "
            "descent_direction does, or call requires_grad_(True) on what is to be trained."
        )
    unlike = [
        name
        for name, g in direction.items()
        if isinstance(g, DTensor) != isinstance(parameters[name], DTensor)
        or (isinstance(g, DTensor) and g.placements != parameters[name].placements)  # type: ignore[attr-defined]
    ]
    if unlike:
        raise ValueError(
            f"token_utilities: {some(unlike)} in the direction are not sharded as the model's "
            "parameters are. Make the direction with descent_direction after fully_shard."
        )
    alone = head_alone(model)
    if alone is not None and alone in direction and isinstance(parameters[alone], DTensor):
        raise ValueError(
            f"token_utilities: {alone} is tied to the embeddings, and of a sharded model the "
            "head's use alone cannot be probed. Choose other parameters."
        )
    largest = check_finite(direction)
    head = set(causal_lm(model).get_output_embeddings().parameters())
    parallel = vocabulary_parallel(model)
    return {
        name: Probed(
            parameters[name],
            g.detach().to(parameters[name].device),
            largest[name] > 0,
            parameters[name] in head,
            "weight" if name == alone else parallel.get(parameters[name]),
        )
        for name, g in direction.items()
    }
