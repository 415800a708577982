"""Batches of trajectories: padded, or packed into one row without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vcore_train.examples import IGNORE_INDEX, NUMBER, Row

# What a batch carries for the trainer and the model must not see.
TRAINER_KEYS = (NUMBER, "answer_mask")
Batch = dict[str, "Tensor | int"]


@dataclass(frozen=True)
class PaddingCollator:
    """Rows padded on the right: ``input_ids``, ``labels``, ``attention_mask`` [B, T].

    Labels are -100 in the padding, and absent where rows have none. Also ``example_index`` [B] and,
    where rows have one, ``answer_mask`` [B, T].

    Args:
        pad_token_id: fills ``input_ids``; any valid token, since nothing attends to it.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int = 1

    def __call__(self, rows: Sequence[Row]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(name: str, fill: int) -> Tensor:
            return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

        batch: Batch = {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": torch.tensor(
                [[int(t < len(row["input_ids"])) for t in range(width)] for row in rows]
            ),
        }
        if "labels" in rows[0]:
            batch["labels"] = padded("labels", IGNORE_INDEX)
        return _with_trainer_keys(
            batch, rows, padded("answer_mask", 0) if "answer_mask" in rows[0] else None
        )


@dataclass(frozen=True)
class PackingCollator:
    """Rows one after the other as a single one: ``input_ids``, ``labels``, ``position_ids`` [1, N].

    Positions restart at each row, and ``cu_seq_lens_q``, ``cu_seq_lens_k`` (int32, [S + 1]),
    ``max_length_q``, ``max_length_k`` bound them in the convention of flash-attn, so that rows do
    not see each other under any attention implementation of transformers. The first label of each
    row is -100: the token before it belongs to another row. Also ``example_index`` [S] and, where
    rows have one, ``answer_mask`` [1, N].
    """

    def __call__(self, rows: Sequence[Row]) -> Batch:
        lengths = [len(row["input_ids"]) for row in rows]
        boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

        def joined(name: str) -> Tensor:
            return torch.tensor([[value for row in rows for value in row[name]]])

        labels = joined("labels")
        labels[0, boundaries[:-1].long()] = IGNORE_INDEX
        batch: Batch = {
            "input_ids": joined("input_ids"),
            "labels": labels,
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        return _with_trainer_keys(
            batch, rows, joined("answer_mask") if "answer_mask" in rows[0] else None
        )


def _with_trainer_keys(batch: Batch, rows: Sequence[Row], answer_mask: Tensor | None) -> Batch:
    if NUMBER in rows[0]:
        batch[NUMBER] = torch.tensor([row[NUMBER] for row in rows])
    if answer_mask is not None:
        batch["answer_mask"] = answer_mask
    return batch


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that the model takes."""
    return {name: value for name, value in batch.items() if name not in TRAINER_KEYS}
