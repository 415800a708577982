"""Log-probabilities of the training examples under the initial policy, for iw-SFT."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vcore_train.collators import model_inputs
from vcore_train.examples import NUMBER, Examples
from vcore_train.modeling import probing, token_nll
from vcore_train.sharding import reshard, within_forward
from vcore_train.supervised import SupervisedTokens


class ReferenceLogp:
    """log p(token) of every supervised token of every training example, in host memory.

    One forward pass over the training set before the first step, and 4 bytes for each supervised
    token; no second copy of the model. Checkpoints carry it, so that a resumed run keeps the policy
    at the start.
    """

    def __init__(self, numbers: Tensor, cu_seqlens: Tensor, logp: Tensor):
        self.numbers = numbers  # [S] number of each example in the dataset
        self.cu_seqlens = cu_seqlens  # [S + 1]
        self.logp = logp  # [N]
        self._place = {number: place for place, number in enumerate(numbers.tolist())}

    @classmethod
    def of(
        cls,
        model: nn.Module,
        examples: Examples,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        batch_size: int,
    ) -> "ReferenceLogp":
        """One pass over ``examples``; ``collate`` returns batches on the model's device."""
        order = sorted(range(len(examples)), key=examples.lengths.__getitem__)
        logp = []
        with torch.no_grad(), probing(model, attention=None):
            for start in range(0, len(order), batch_size):
                batch = collate([examples[i] for i in order[start : start + batch_size]])
                tokens = SupervisedTokens.of([batch])
                inputs = model_inputs(batch)
                nll = within_forward(model, model, partial(token_nll, model, inputs))
                packed = -tokens.packed([nll])
                logp.extend(packed.float().cpu().split(tokens.cu_seqlens.diff().tolist()))
        reshard(model)
        counts = torch.tensor([0, *(part.numel() for part in logp)])
        numbers = torch.tensor([examples.numbers[i] for i in order])
        return cls(numbers, counts.cumsum(0), torch.cat(logp))

    def check(self, examples: Examples) -> None:
        """Raises ValueError unless these are the examples that the reference was taken of."""
        if sorted(self.numbers.tolist()) != examples.numbers:
            raise ValueError(
                f"the checkpoint holds the reference of {self.numbers.numel()} examples, and the "
                f"training set has {len(examples)}, or others. Resume with the same training set."
            )

    def for_batch(self, batch: Mapping[str, Any]) -> Tensor:
        """Reference log-probabilities shaped like the batch's labels, 0 where not supervised."""
        if NUMBER not in batch:
            raise ValueError(
                f"method 'iw_sft' finds the reference of an example by its {NUMBER}, which the "
                "data collator dropped. Use PaddingCollator or PackingCollator, or pass the key "
                "through."
            )
        tokens = SupervisedTokens.of([batch])
        places = [self._place[number] for number in batch[NUMBER].tolist()]
        parts = [self.logp[self.cu_seqlens[p] : self.cu_seqlens[p + 1]] for p in places]
        packed = torch.cat([self.logp[:0], *parts])
        if packed.numel() != tokens.count:
            raise ValueError(
                f"the reference of examples {batch[NUMBER].tolist()} has {packed.numel()} tokens, "
                f"and the batch supervises {tokens.count} of them. Resume with the same training "
                "set."
            )
        return tokens.unpacked(packed.to(batch["labels"].device))[0]

    def state(self) -> dict[str, Tensor]:
        return {"numbers": self.numbers, "cu_seqlens": self.cu_seqlens, "logp": self.logp}
