"""Prompts with a reference answer, to sample responses for and to check them against.

Rows come as for :mod:`vcore_train.data`. Their fields are named by the caller or recognised from
the first row: GSM8K's ``question``/``answer``; ``problem`` with ``solution`` and, in MATH-500 and
NuminaMath-1.5, ``answer``; ``prompt``, text or turns, with ``answer``, ``solution``,
``ground_truth`` or verl's ``reward_model.ground_truth``; or a conversation whose last turn, the
assistant's, holds the answer.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vcore_train.answers import final_answer
from vcore_train.data import (
    ANSWER_MARK,
    CONVERSATION_FIELDS,
    PROMPT_FIELDS,
    Conversation,
    check_characters,
    check_turns,
    listed,
    plain_text,
    read_rows,
    recognise,
    split_conversation,
    take_prompt,
    value_of,
)

ANSWER_FIELDS = (  # the answer alone, or a solution in which it is marked
    "answer",
    "final_answer",
    "expected_answer",
    "reward_model.ground_truth",
    "ground_truth",
    "reference",
    "target",
    "label",
)
SOLUTION_FIELDS = ("solution", "response", "completion", "output")  # only what is marked counts
MARKS = (ANSWER_MARK, r"\boxed", r"\fbox")
NUMINA_MATH = ("problem", "answer")
NUMINA_MATH_UNANSWERED = ("proof", "notfound")


@dataclass(frozen=True)
class Prompt:
    """A prompt (text, or the turns of a conversation), the answer alone, and where they stood."""

    prompt: str | Conversation
    answer: str
    where: str


def read_prompts(
    data: str | Path,
    *,
    split: str = "train",
    prompt_field: str | None = None,
    answer_field: str | None = None,
    limit: int | None = None,
    unanswered: str = "error",
    suffix: str = "",
) -> tuple[list[Prompt], int]:
    r"""Reads the rows of ``data``; returns the prompts and how many rows were skipped.

    The reference is what ``####`` or ``\boxed{}`` marks in the answer field, see
    :func:`vcore_train.answers.final_answer`. Without a mark it is the whole field, a number as its
    text; but the solutions of ``SOLUTION_FIELDS`` and conversations, unless the caller named the
    field, must have one. Rows without a reference are unanswered, and so are those for which
    NuminaMath says ``proof`` or ``notfound``.

    Args:
        data, split: as for :func:`vcore_train.data.read_examples`.
        prompt_field, answer_field: None: recognised. A dotted name reaches inside a field. One
            name for both means a conversation that ends with the answer.
        limit: only the first rows.
        unanswered: ``"error"`` or ``"skip"`` for rows without a reference.
        suffix: appended to each prompt, in a conversation to the user's last turn.

    Raises ValueError or FileNotFoundError with the file, the row and the mend.
    """
    if unanswered not in ("error", "skip"):
        raise ValueError(f"read_prompts: unanswered must be 'error' or 'skip', got {unanswered!r}.")
    prompts: list[Prompt] = []
    skipped = 0
    fields: _Fields | None = None
    for where, row in read_rows(data, split, limit):
        if fields is None:
            fields = _Fields.find(row, prompt_field, answer_field, where)
        prompt = fields.take_prompt(row, where)
        answer = fields.take_answer(row, where)
        check_characters(plain_text(prompt), fields.prompt, where)
        check_characters(answer, fields.answer, where)
        if answer:
            prompts.append(Prompt(_with_suffix(prompt, suffix, where), answer, where))
        elif unanswered == "skip":
            skipped += 1
        else:
            raise ValueError(
                f"{where}: no reference answer: {fields.lack(row)}. Remove the row, skip such rows "
                "with --unanswered skip, or name the field of the answer with --answer-field."
            )
    if not prompts:
        raise ValueError(f"{data}: no prompts with a reference answer ({skipped} without one).")
    return prompts, skipped


@dataclass(frozen=True)
class _Fields:
    """Which fields hold the prompt and the answer; one name for both means a conversation."""

    prompt: str
    answer: str
    detected: bool  # the prompt, rather than named
    only_marked: bool  # the answer field holds solutions

    @classmethod
    def find(
        cls, row: Mapping[str, Any], prompt: str | None, answer: str | None, where: str
    ) -> "_Fields":
        prompts = (*PROMPT_FIELDS, *CONVERSATION_FIELDS)
        answers = (*ANSWER_FIELDS, *SOLUTION_FIELDS, *CONVERSATION_FIELDS)
        found_prompt = prompt or recognise(row, prompts, "prompt", where)
        found_answer = answer or recognise(row, answers, "answer", where)
        solves = answer is None and found_answer not in ANSWER_FIELDS
        return cls(found_prompt, found_answer, prompt is None, solves)

    def take_prompt(self, row: Mapping[str, Any], where: str) -> str | Conversation:
        prompt = take_prompt(row, self.prompt, where, detected=self.detected)
        if self.prompt == self.answer:
            return split_conversation(prompt, self.prompt, where)[0]
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            raise ValueError(
                f"{where}: the conversation {self.prompt!r} ends with an assistant turn, expected "
                "the turn to answer. Remove the turn, or take the reference from it with "
                f"--answer-field {self.prompt}."
            )
        return prompt

    def take_answer(self, row: Mapping[str, Any], where: str) -> str:
        """The reference, or nothing."""
        value = value_of(row, self.answer)
        if isinstance(value, list):
            turn = check_turns(value, self.answer, where)[-1]
            if turn["role"] != "assistant":
                raise ValueError(
                    f"{where}: the conversation {self.answer!r} ends with a turn of role "
                    f"{turn['role']!r}, expected the assistant's, with the answer."
                )
            value = turn["content"]
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(
                f"{where}: field {self.answer!r} is {type(value).__name__}, expected text or a "
                "number."
            )
        text = str(value).strip()
        if (self.prompt, self.answer) == NUMINA_MATH and text in NUMINA_MATH_UNANSWERED:
            return ""
        if self.only_marked or any(mark in text for mark in MARKS):
            return final_answer(text) or ""
        return text

    def lack(self, row: Mapping[str, Any]) -> str:
        """Why a row has no reference."""
        value = value_of(row, self.answer)
        if value is None:
            return f"field {self.answer!r} is missing or null; the row has {listed(row)}"
        if self.only_marked:
            return f"field {self.answer!r} marks none with #### or \\boxed{{}}"
        return f"field {self.answer!r} is {str(value)[-60:]!r}"


def _with_suffix(prompt: str | Conversation, suffix: str, where: str) -> str | Conversation:
    if isinstance(prompt, str):
        return prompt + suffix
    if not suffix:
        return prompt
    users = [place for place, turn in enumerate(prompt) if turn["role"] == "user"]
    if not users:
        raise ValueError(f"{where}: the conversation has no user turn to append the suffix to.")
    last = users[-1]
    turn = {**prompt[last], "content": prompt[last]["content"] + suffix}
    return [*prompt[:last], turn, *prompt[last + 1 :]]


def as_prompts(dataset: Iterable[Any], what: str) -> list[Prompt]:
    """The rows of a data set in memory: :class:`Prompt` objects, or mappings with ``prompt`` (text
    or turns) and ``answer``, read as :func:`read_prompts` reads them.

    ``what`` names the data set in errors, which are ValueError and TypeError.
    """
    fields = _Fields("prompt", "answer", detected=False, only_marked=False)
    prompts = []
    for number, row in enumerate(dataset):
        where = f"{what} data, row {number}"
        if isinstance(row, Prompt):
            prompts.append(row)
            continue
        if not isinstance(row, Mapping):
            raise TypeError(
                f"{where}: a {type(row).__name__}, expected a Prompt or a mapping with 'prompt' "
                "and 'answer'."
            )
        if row.get("prompt") is None or (isinstance(row["prompt"], str) and not row["prompt"]):
            raise ValueError(
                f"{where}: no 'prompt'; the row has {listed(row)}. Rows of another layout can be "
                "read with vcore_train.prompts.read_prompts."
            )
        prompt, answer = fields.take_prompt(row, where), fields.take_answer(row, where)
        if not answer:
            raise ValueError(f"{where}: no reference answer: {fields.lack(row)}. Remove the row.")
        prompts.append(Prompt(prompt, answer, where))
    if not prompts:
        raise ValueError(f"{what} data: no prompts.")
    return prompts
