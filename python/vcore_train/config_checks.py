"""Checks of options that the configurations share. ``owner`` is the configuration's name."""

import math


def option_error(owner: str, name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{owner}: {name} must be {allowed}, got {value!r}.")


def check_number(
    owner: str,
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises ValueError unless ``value`` is a finite number within the bounds."""
    allowed = f"a finite number {'above' if low_open else 'of at least'} {low}"
    if high < math.inf:
        allowed += f" and {'below' if high_open else 'at most'} {high}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise option_error(owner, name, value, allowed)
    if value < low or value > high or (low_open and value == low) or (high_open and value == high):
        raise option_error(owner, name, value, allowed)


def check_count(owner: str, name: str, value: object, low: int) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise option_error(owner, name, value, f"a whole number of at least {low}")
