"""The diverging colours of token weights: blue below 1, white at 1, red above."""

import math
from itertools import pairwise

# Colours at log2(weight) = -2 ... 2, and the ink that reads on them.
_STOPS = (
    (-2.0, (33, 102, 172)),
    (-1.0, (146, 197, 222)),
    (0.0, (247, 247, 247)),
    (1.0, (244, 165, 130)),
    (2.0, (178, 24, 43)),
)


def colour_of(weight: float) -> tuple[str, str]:
    """Background and ink for a weight, as ``#rrggbb``; weights beyond 1/4 and 4 look alike."""
    place = min(max(math.log2(weight), -2.0), 2.0) if weight > 0 else -2.0
    for (low, first), (high, second) in pairwise(_STOPS):
        if place <= high:
            part = (place - low) / (high - low)
            rgb = [round(a + part * (b - a)) for a, b in zip(first, second, strict=True)]
            break
    bright = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#111111" if bright > 140 else "#ffffff"


def legend_values() -> list[float]:
    return [2.0**power for power in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2)]
