"""The trajectories of a dataset as the trainer reads them: checked, cut to length, numbered."""

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from vcore_train.modeling import IGNORE_INDEX

# Columns with one entry for each token. answer_mask marks tokens that method "random" always keeps.
TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask", "answer_mask")
NUMBER = "example_index"
Row = dict[str, Any]


class Examples(Dataset):
    """A map-style dataset without its unusable rows, each row with its number in the original one.

    Rows are mappings with ``input_ids``, ``labels`` (-100 where not supervised) and optionally
    ``attention_mask`` (1 for tokens; masked ones are dropped) and ``answer_mask`` (1 for tokens of
    the final answer). All rows are read once, here. Rows without any supervised token, which
    includes those whose response ``max_length`` cuts off, are left out and counted in ``skipped``.

    Args:
        rows: the dataset.
        max_length: rows are cut to this many tokens; None cuts nothing.
        window: tokens that the model can take; None if it has no limit.
        vocabulary: tokens that the model knows; None checks no upper bound.
        every: keep rows without a supervised token too, as a prediction must. Labels may then be
            missing, from all rows or from none.

    Raises:
        TypeError, ValueError: a row is no mapping, lacks a column, its columns differ in length or
            hold anything but token ids below ``vocabulary``, or it is longer than the window, with
            the row's number; or no row is left.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        max_length: int | None,
        window: int | None,
        vocabulary: int | None = None,
        *,
        every: bool = False,
    ):
        if not len(rows):
            raise ValueError("dataset: no examples. The trainer needs at least one.")
        self.rows, self.max_length = rows, max_length
        self.numbers: list[int] = []
        self.lengths: list[int] = []
        labelled = not every or has_labels(rows[0])
        for number in range(len(rows)):
            row = checked_row(
                rows[number], number, max_length, window, vocabulary, labelled=labelled
            )
            if every or is_supervised(row):
                self.numbers.append(number)
                self.lengths.append(len(row["input_ids"]))
        self.skipped = len(rows) - len(self.numbers)
        if not self.numbers:
            raise ValueError(
                f"dataset: none of its {len(rows)} examples has a supervised token. Labels are "
                "-100 for the prompt and the token itself for the response; max_length may cut "
                "every response off."
            )

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Row:
        number = self.numbers[index]
        return {**token_columns(self.rows[number], self.max_length), NUMBER: number}


class ExampleStream(IterableDataset):
    """The same over an iterable dataset, checked as it is read; ``skipped`` counts so far."""

    def __init__(
        self,
        rows: IterableDataset,
        max_length: int | None,
        window: int | None,
        vocabulary: int | None = None,
        *,
        every: bool = False,
    ):
        self.rows, self.limits, self.every = rows, (max_length, window, vocabulary), every
        self.skipped = 0

    def __iter__(self) -> Iterator[Row]:
        labelled = True
        for number, row in enumerate(self.rows):
            if number == 0:
                labelled = not self.every or has_labels(row)
            checked = checked_row(row, number, *self.limits, labelled=labelled)
            if self.every or is_supervised(checked):
                yield {**checked, NUMBER: number}
            else:
                self.skipped += 1


def numbered_examples(
    rows: Any,
    max_length: int | None,
    window: int | None,
    vocabulary: int | None = None,
    *,
    every: bool = False,
) -> Examples | ExampleStream:
    """``rows`` as :class:`Examples`, or :class:`ExampleStream` where it has no length."""
    if isinstance(rows, Examples | ExampleStream):
        return rows
    if max_length is not None and window is not None and max_length > window:
        raise ValueError(
            f"VcoreTrainer: max_length={max_length} is more than the model's window of {window} "
            f"tokens. Pass max_length={window} or less."
        )
    kind = Examples if hasattr(rows, "__getitem__") and hasattr(rows, "__len__") else ExampleStream
    return kind(rows, max_length, window, vocabulary, every=every)


def token_columns(row: Mapping[str, Any], max_length: int | None) -> Row:
    """The columns that the trainer reads: masked tokens dropped, cut to ``max_length``."""
    columns = {name: _as_list(row[name]) for name in TOKEN_COLUMNS if row.get(name) is not None}
    attended = columns.pop("attention_mask", None)
    if attended is not None and not all(attended):
        kept = [position for position, value in enumerate(attended) if value]
        columns = {name: [values[i] for i in kept] for name, values in columns.items()}
    return {name: values[:max_length] for name, values in columns.items()}


def checked_row(
    row: Mapping[str, Any],
    number: int,
    max_length: int | None,
    window: int | None,
    vocabulary: int | None,
    *,
    labelled: bool,
) -> Row:
    """:func:`token_columns` of a row, or an error with its number."""
    if not isinstance(row, Mapping):
        raise TypeError(
            f"dataset: example {number} is a {type(row).__name__}. The trainer takes tokenised "
            "rows: mappings with input_ids and labels."
        )
    for name in ("input_ids", "labels") if labelled else ("input_ids",):
        if row.get(name) is None:
            raise ValueError(
                f"dataset: example {number} has no {name!r}, only {', '.join(map(str, row))}. The "
                "trainer takes tokenised rows with input_ids and labels."
            )
    if has_labels(row) and not labelled:
        raise ValueError(
            f"dataset: example {number} has labels, and the first has none. A prediction takes "
            "them from all examples or from none."
        )
    given = [name for name in TOKEN_COLUMNS if row.get(name) is not None]
    lengths = {name: _length(row[name], name, number) for name in given}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"dataset: the columns of example {number} differ in length: {lengths}.")
    columns = token_columns(row, max_length)
    length = len(columns["input_ids"])
    if window is not None and length > window:
        raise ValueError(
            f"dataset: example {number} has {length} tokens, more than the model's window of "
            f"{window}. Set max_length={window} to cut it, or leave it out."
        )
    for name in ("input_ids", "labels") if labelled else ("input_ids",):
        _check_tokens(columns[name], name, number, vocabulary)
    return columns


def has_labels(row: Any) -> bool:
    """Whether a row, which may be no mapping, comes with labels."""
    return isinstance(row, Mapping) and row.get("labels") is not None


def is_supervised(row: Row) -> bool:
    """Whether some token after the first is supervised (nothing predicts the first)."""
    return any(label != IGNORE_INDEX for label in row["labels"][1:])


def _check_tokens(values: list[Any], name: str, number: int, vocabulary: int | None) -> None:
    if set(map(type, values)) <= {int}:  # the common case, quickly
        tokens = set(values) - ({IGNORE_INDEX} if name == "labels" else set())
        if not tokens or (min(tokens) >= 0 and (vocabulary is None or max(tokens) < vocabulary)):
            return
    allowed = "whole numbers of at least 0"
    if vocabulary is not None:
        allowed += f" and below the model's vocabulary of {vocabulary}"
    if name == "labels":
        allowed += f", or {IGNORE_INDEX}"
    for value in values:
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        known = whole and value >= 0 and (vocabulary is None or value < vocabulary)
        if not known and not (whole and name == "labels" and value == IGNORE_INDEX):
            raise ValueError(
                f"dataset: {name} of example {number} must be {allowed}, got {value!r}."
            )


def _length(values: Any, name: str, number: int) -> int:
    try:
        return len(values)
    except TypeError:  # a number, or a tensor of no dimension
        raise ValueError(
            f"dataset: {name} of example {number} must be a list of whole numbers, got {values!r}."
        ) from None


def _as_list(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else list(values)
