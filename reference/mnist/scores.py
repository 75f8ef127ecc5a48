"""Acquired, retained and overall: the three numbers that only together say whether steering worked."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference.mnist.data import Split

Scores = dict[str, Any]
"""{"overall": float, "retained": float, "acquired": float, "acquired_by_digit": {digit: float}}, as fractions."""


def predict(model: nn.Module, x: Tensor) -> Tensor:
    """The digit that the model reads in each image."""
    with torch.inference_mode():
        return torch.cat([model(batch).argmax(dim=1) for batch in x.split(2048)]).clone()


class Judge:
    """Scores a model, steered or not, on one split, against the unsteered model that it was made with."""

    def __init__(self, model: nn.Module, split: Split, *, new: Sequence[int]) -> None:
        self.split = split
        self.new = tuple(new)
        self._is_new = torch.isin(split.y, torch.tensor(self.new))
        self._unsteered_old = self._share(predict(model, split.x), ~self._is_new)

    def __call__(self, model: nn.Module) -> Scores:
        """retained is the accuracy on the old digits as a share of the unsteered model's."""
        found = predict(model, self.split.x)
        return {
            "overall": self._share(found, torch.ones_like(self._is_new)),
            "retained": self._share(found, ~self._is_new) / self._unsteered_old,
            "acquired": self._share(found, self._is_new),
            "acquired_by_digit": {str(digit): self._share(found, self.split.y == digit) for digit in self.new},
        }

    def _share(self, found: Tensor, rows: Tensor) -> float:
        share: float = (found == self.split.y)[rows].double().mean().item()
        return share


def balance(scores: Mapping[str, Any]) -> float:
    """The harmonic mean of retained and of acquired on each new digit: high only if all are high.

    What the strength of a fixed direction is chosen by; overall accuracy would choose not to steer at all.
    """
    parts = [min(scores["retained"], 1.0), *scores["acquired_by_digit"].values()]
    mean: float = statistics.harmonic_mean(parts)
    return mean


def spread(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "std", "values"} over seeds."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def summarize(runs: Sequence[Scores]) -> dict[str, Any]:
    """The same scores over seeds: {"mean", "std", "values"} in place of each number (std with n - 1; 0 for one)."""
    digits = runs[0]["acquired_by_digit"]
    return {key: spread([run[key] for run in runs]) for key in ("overall", "retained", "acquired")} | {
        "acquired_by_digit": {digit: spread([run["acquired_by_digit"][digit] for run in runs]) for digit in digits}
    }
