"""What files of results hold: plain values for JSON, and tables in Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def plain(value: Any, digits: int | None = None) -> Any:
    """``value`` as JSON has it: text for keys, lists for tuples, numbers for scalar tensors, None
    for NaN and infinities; of anything strange its text.

    ``digits``: floats are rounded to so many significant ones, which keeps files small.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(value if digits is None else f"{value:.{digits}g}")
    if value is None or isinstance(value, str | int):
        return value
    return plain(value.item(), digits) if hasattr(value, "item") else str(value)


def markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], text: int | None = None
) -> list[str]:
    """The table's lines. The columns after the first ``text`` hold numbers and stand at the right;
    by default none does. Cells must not hold ``|``.
    """
    left = len(headings) if text is None else text
    rules = ["---" if place < left else "--:" for place in range(len(headings))]
    return [f"| {' | '.join(row)} |" for row in (headings, rules, *rows)]
