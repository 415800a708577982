"""``vcore show-weights``: the weight that VCORE gives each token of one response."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vcore_kernels import gibbs_weights
from vcore_train.collators import PaddingCollator
from vcore_train.colours import colour_of, legend_values
from vcore_train.config import DEFAULT_KL_BUDGET
from vcore_train.data import Example, encode, read_examples
from vcore_train.directions import descent_direction
from vcore_train.modeling import IGNORE_INDEX
from vcore_train.models import load_model, load_tokenizer, window_of
from vcore_train.utilities import token_utilities_and_nll
from vcore_train.weights_page import weights_page

PROBE_BATCH = 8


@dataclass(frozen=True)
class Token:
    """``weight`` is q * n: 1 where supervision is uniform. None stands for the prompt's tokens."""

    text: str
    weight: float | None = None
    utility: float | None = None
    nll: float | None = None


@dataclass(frozen=True)
class WeightedTrajectory:
    """The tokens of a trajectory, and the figures of its weights."""

    tokens: list[Token]
    tau: float
    kl: float
    ess: float
    where: str

    @property
    def supervised(self) -> list[Token]:
        return [token for token in self.tokens if token.weight is not None]


def weigh_trajectory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, list[int]],
    probe: Sequence[dict[str, list[int]]],
    *,
    where: str = "",
    **sharpness: float,
) -> WeightedTrajectory:
    """Weights of ``row`` against the mean gradient over the ``probe`` rows.

    ``row`` and ``probe``: ``input_ids`` and ``labels``. ``sharpness``: one of kl_budget, tau and
    temperature, as :func:`vcore_kernels.gibbs_weights` takes it; by default a KL budget of 0.1.
    """
    collate = PaddingCollator(tokenizer.pad_token_id or 0)

    def batch(rows):
        keys = ("input_ids", "labels", "attention_mask")
        made = collate(rows)
        return {name: torch.as_tensor(made[name]).to(model.device) for name in keys}

    batches = [batch(probe[i : i + PROBE_BATCH]) for i in range(0, len(probe), PROBE_BATCH)]
    direction = descent_direction(model, batches, kind="probe")
    inputs = batch([dict(row)])
    utility, nll, *_ = token_utilities_and_nll(model, inputs, direction)
    mask = inputs["labels"] != IGNORE_INDEX
    mask[:, 0] = False
    wanted: dict[str, Any] = dict(sharpness) or {"kl_budget": DEFAULT_KL_BUDGET}
    found = gibbs_weights(utility, mask=mask, **wanted)
    weight = found.q * mask.sum()
    tokens = []
    for place, (token, supervised) in enumerate(
        zip(row["input_ids"], mask[0].tolist(), strict=True)
    ):
        text = _text(tokenizer, token)
        if supervised:
            values = (float(x[0, place]) for x in (weight, utility, nll))
            tokens.append(Token(text, *values))
        else:
            tokens.append(Token(text))
    return WeightedTrajectory(tokens, float(found.tau), float(found.kl), float(found.ess), where)


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text; one that is part of a character in the tokenizer's own spelling."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return str(tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else str(text)


def terminal_text(trajectory: WeightedTrajectory) -> Text:
    """The trajectory for the terminal: prompt dim, response on colours that stand for weights."""
    text = Text()
    for token in trajectory.tokens:
        if token.weight is None:
            text.append(token.text, style="dim")
            continue
        background, ink = colour_of(token.weight)
        visible = token.text.rstrip("\n")
        shown = visible or "\u23ce"
        text.append(shown, style=f"{ink} on {background}")
        text.append("\n" * (len(token.text) - len(visible)))
    return text


def legend() -> Text:
    """A strip of the colours with the weights they stand for."""
    text = Text("weight ")
    for value in legend_values():
        background, ink = colour_of(value)
        text.append(f" {value:.2g} ", style=f"{ink} on {background}")
    text.append("  (1: as in uniform supervision)", style="dim")
    return text


def show(
    checkpoint: str,
    data: str,
    *,
    row: int,
    pair: tuple[str | None, str | None] | None,
    sharpness: Mapping[str, float],
    probe_rows: int,
    prompt_field: str | None,
    response_field: str | None,
    split: str,
    html: Path,
    seed: int,
    console: Console,
) -> None:
    """Loads, weighs, prints and writes the page. User mistakes raise ValueError or OSError."""
    if pair is not None and (pair[0] is None or not pair[1]):
        raise ValueError("pass --prompt and --response together.")
    tokenizer, model = load_tokenizer(checkpoint), _load(checkpoint)
    examples, _ = read_examples(
        data, split=split, prompt_field=prompt_field, response_field=response_field, empty="skip"
    )
    if pair is None and not 1 <= row <= len(examples):
        raise ValueError(f"--row {row}: {data} has rows 1 to {len(examples)}.")
    example = (
        examples[row - 1]
        if pair is None
        else Example(str(pair[0]), str(pair[1]), "the given prompt and response")
    )
    limit = window_of(model)
    (chosen,) = encode([example], tokenizer, max_length=limit).rows
    others = [other for other in examples if other is not example] or [example]
    drawn = random.Random(seed).sample(others, min(probe_rows, len(others)))
    probe = encode(drawn, tokenizer, max_length=limit, too_long="truncate").rows
    with console.status(f"Probing with {len(probe)} rows"):
        trajectory = weigh_trajectory(
            model, tokenizer, chosen, probe, where=example.where, **sharpness
        )
    console.print(terminal_text(trajectory), soft_wrap=True)
    console.print()
    console.print(legend())
    console.print(
        f"{len(trajectory.supervised)} response tokens   KL {trajectory.kl:.4f} nats   "
        f"tau {trajectory.tau:.4g}   ESS {trajectory.ess:.3f}"
    )
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(
        weights_page([trajectory], title=f"Token weights: {checkpoint}"), encoding="utf-8"
    )
    console.print(f"Page: [bold]{html}[/]", soft_wrap=True)


def _load(checkpoint: str) -> PreTrainedModel:
    """A model with its trained parameters trainable: the adapters where it is an adapter."""
    if (Path(checkpoint) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(
            checkpoint, is_trainable=True, dtype=torch.float32
        )
    return load_model(checkpoint)
