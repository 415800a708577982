"""Rollout engines: where responses come from. One interface, so that any sampler can serve."""

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from vcore_train.modeling import causal_lm, probing


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: at most ``max_new_tokens``, the end-of-sequence token included.

    ``temperature`` 0 is greedy. ``top_p`` 1 and ``top_k`` 0 leave no token out.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Response(NamedTuple):
    """Token ids up to the end-of-sequence token, and whether it came before the length limit."""

    tokens: list[int]
    finished: bool


class RolloutEngine(Protocol):
    """Samples responses. Another engine is a class with these two methods."""

    def load(self, model: nn.Module) -> None:
        """Takes over the weights of ``model``, before each iteration and each evaluation."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
    ) -> list[list[Response]]:
        """For each tokenised prompt a list of ``counts`` responses.

        A list may be shorter than asked for (the trainer asks again), never longer. The same
        arguments and weights should give the same responses, so that an interrupted run goes on as
        if nothing had happened.
        """


class TransformersEngine:
    """Batched ``model.generate`` of transformers on the policy itself. No second copy of weights.

    Dropout is off and the global random state is left as it was. All responses of a call run as
    one padded batch, so the caller decides how many fit.

    Args:
        tokenizer: gives the padding and end-of-sequence tokens; those of the model's generation
            configuration end a response too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise ValueError("TransformersEngine: the tokenizer has no end-of-sequence token.")
        self.tokenizer = tokenizer
        self.model: nn.Module | None = None

    def load(self, model: nn.Module) -> None:
        self.model = model

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
    ) -> list[list[Response]]:
        if self.model is None:
            raise RuntimeError("TransformersEngine: call load(model) before sample.")
        repeated = [list(p) for p, n in zip(prompts, counts, strict=True) for _ in range(n)]
        if not repeated:
            return [[] for _ in prompts]
        generate: Any = self.model.generate
        lm = causal_lm(self.model)
        longest = max(map(len, repeated))
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in repeated])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in repeated])
        ends = end_tokens(self.model, self.tokenizer)
        with torch.no_grad(), probing(self.model, attention=None), _without_defaults(lm):
            torch.manual_seed(seed)
            out = generate(
                ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=_generation_config(sampling, ends, pad),
            )
        assert len(out) == len(repeated)
        rows = iter(out[:, longest:].tolist())
        return [[cut_at_end(next(rows), ends) for _ in range(n)] for n in counts]


@contextmanager
def _without_defaults(lm: PreTrainedModel) -> Iterator[None]:
    """``lm`` without its generation defaults: what is sampled is the distribution of its logits.

    ``generate`` reads them wherever the configuration that it is given leaves a field open.
    """
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


def _generation_config(sampling: Sampling, ends: list[int], pad: int) -> GenerationConfig:
    if sampling.temperature == 0:
        drawn: dict[str, Any] = {"do_sample": False}
    else:
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
    return GenerationConfig(
        **drawn,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
    )


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a response: the tokenizer's token, and those of the generation configuration."""
    generation = causal_lm(model).generation_config
    own = None if generation is None else generation.eos_token_id
    listed = own.tolist() if isinstance(own, Tensor) else own
    more = listed if isinstance(listed, list) else [] if listed is None else [listed]
    ends: list[Any] = [tokenizer.eos_token_id, *more]
    return list(dict.fromkeys(ends))


def cut_at_end(tokens: Sequence[int], ends: Sequence[int]) -> Response:
    """The tokens up to the first that ends a response, that one included."""
    for place, token in enumerate(tokens):
        if token in ends:
            return Response(list(tokens[: place + 1]), True)
    return Response(list(tokens), False)


def checked_responses(
    responses: Any,
    counts: Sequence[int],
    *,
    engine: RolloutEngine,
    vocabulary: int,
    max_new_tokens: int,
) -> list[list[Response]]:
    """What an engine returned, as plain :class:`Response` objects; those without a token left out.

    Raises RuntimeError where it does not fit what was asked for.
    """
    call = f"{type(engine).__name__}.sample"
    expected = "One list of responses, pairs of token ids and whether it finished, for each prompt"
    if not isinstance(responses, list | tuple) or len(responses) != len(counts):
        came = len(responses) if isinstance(responses, list | tuple) else type(responses).__name__
        raise RuntimeError(f"{call}: returned {came} for {len(counts)} prompts. {expected}.")
    checked = []
    for place, (rows, asked) in enumerate(zip(responses, counts, strict=True)):
        if not isinstance(rows, list | tuple) or len(rows) > asked:
            came = len(rows) if isinstance(rows, list | tuple) else type(rows).__name__
            raise RuntimeError(f"{call}: returned {came} for prompt {place}, asked for {asked}.")
        for row in rows:
            _check_response(row, call, place, vocabulary, max_new_tokens)
        plain = [Response([int(t) for t in tokens], bool(finished)) for tokens, finished in rows]
        checked.append([response for response in plain if response.tokens])
    return checked


def _check_response(row: Any, call: str, place: int, vocabulary: int, most: int) -> None:
    try:
        tokens, _ = row
        tokens = [operator.index(token) for token in tokens]
    except (TypeError, ValueError):
        raise RuntimeError(
            f"{call}: returned {row!r:.80} for prompt {place}, expected a pair of token ids and "
            "whether it finished."
        ) from None
    wrong = [token for token in tokens if not 0 <= token < vocabulary]
    if wrong:
        raise RuntimeError(
            f"{call}: token {wrong[0]} for prompt {place} is not in the vocabulary of {vocabulary}."
        )
    if len(tokens) > most:
        raise RuntimeError(
            f"{call}: {len(tokens)} tokens for prompt {place}, max_new_tokens is {most}."
        )


class NoEngine:
    """Stands for the engine where an M-step goes on: everything must have been sampled before."""

    def load(self, model: nn.Module) -> None:
        pass

    def sample(self, *args: Any, **kwargs: Any) -> list[list[Response]]:
        raise ValueError(
            "GvmTrainer: the checkpoint is in the middle of an iteration whose responses are not "
            "all on disk, and its weights have moved on. Resume from the checkpoint at its start."
        )
