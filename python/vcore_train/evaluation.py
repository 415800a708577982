"""How good a model is on held-out rows: loss on the reference responses, greedy responses."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vcore_train.collators import PaddingCollator
from vcore_train.modeling import IGNORE_INDEX, probing, token_nll


class RowLosses(NamedTuple):
    """Per row [R]: summed loss of its supervised tokens in nats, and their number."""

    nll: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Mean loss of a supervised token, nats."""
        return float(self.nll.sum() / self.tokens.sum())


def row_losses(
    model: PreTrainedModel, rows: Sequence[dict[str, list[int]]], *, batch_size: int = 32
) -> RowLosses:
    """Teacher-forced losses of ``rows`` (input_ids, labels), in their order, dropout off."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    collate = PaddingCollator(model.config.pad_token_id or 0)
    nll, tokens = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows))
    with torch.no_grad(), probing(model, attention=None):
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            batch = collate([rows[i] for i in index])
            inputs = {
                name: torch.as_tensor(batch[name]).to(model.device)
                for name in ("input_ids", "labels", "attention_mask")
            }
            nll[index] = token_nll(model, inputs).sum(-1).double().cpu()
            tokens[index] = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum(-1).float().cpu()
    return RowLosses(nll, tokens)


def greedy_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """The greedy continuation of each tokenised prompt, as text without special tokens."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    training = model.training
    generate: Any = model.generate
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in index)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in index])
            mask = torch.tensor(
                [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in index]
            )
            out = generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
            responses = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            for i, text in zip(index, responses, strict=True):
                texts[i] = text
    finally:
        model.train(training)
    return texts
