"""Figures of training between two log lines."""

from collections import defaultdict

import torch
from torch import Tensor

from vcore_train.processes import Processes


class Metrics:
    """Means over the optimizer steps since the last log line, and totals over the whole run.

    Values stay on their device until a line is due, so that collecting them waits for nothing.
    """

    def __init__(self) -> None:
        self.totals: dict[str, int] = defaultdict(int)
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._sums: dict[str, Tensor] = {}
        self._probing = self._stepping = 0.0

    def add_mean(self, name: str, value: Tensor) -> None:
        self._values[name].append(value.detach())

    def add_to_ratio(self, name: str, numerator: Tensor, denominator: Tensor) -> None:
        """``name`` will be the sum of the numerators over the sum of the denominators."""
        pair = torch.stack([numerator.detach().double(), denominator.detach().double()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_probing(self, seconds: float) -> None:
        self._probing += seconds

    def add_step(self, seconds: float) -> None:
        """Seconds of a step, its probe included."""
        self._stepping += seconds

    def drain(
        self, processes: Processes | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, float]:
        """The figures as numbers; starts the next interval.

        Ratios are over all ``processes``, by one sum on ``device``; means and totals are the same
        on all of them to begin with.
        """
        figures = {}
        if self._sums:
            pairs = torch.stack([pair.to(device) for pair in self._sums.values()])
            pairs = (processes or Processes()).sum(pairs)
            figures = {n: float(a / b) for n, (a, b) in zip(self._sums, pairs, strict=True)}
        for name, values in self._values.items():
            figures[name] = float(torch.stack([v.double() for v in values]).mean())
        if self._probing and self._stepping:
            figures["probe_time_share"] = self._probing / self._stepping
        self._values.clear()
        self._sums.clear()
        self._probing = self._stepping = 0.0
        return {**figures, **{name: float(total) for name, total in self.totals.items()}}
