"""Budget: what may be lost, and how much of that is used up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import final

from actsteer.tuning.intervals import Of

KL: tuple[Of, ...] = ("mean", "p95")
"""The figures of KL(unsteered ‖ steered) over the rows or tokens of `retain`."""


@final
class Budget:
    """Bounds by name: "mean" and "p95" of the KL on `retain`, or any other metric that `evaluate` gives.

    >>> Budget(0.05).of_kl, Budget({"p95": 0.5, "lost": 0.02}).of_metrics
    ({'mean': 0.05}, {'lost': 0.02})
    """

    def __init__(self, budget: float | Mapping[str, float]) -> None:
        named = dict(budget) if isinstance(budget, Mapping) else {"mean": budget}
        for name, bound in named.items():
            if not isinstance(bound, Real) or isinstance(bound, bool) or math.isnan(bound) or bound < 0:
                raise ValueError(f"budget: expected a number of 0 or more for {name!r}, got {bound!r}")
        if not named:
            raise ValueError("budget: expected a bound on the mean KL, or {name: bound}, got an empty mapping")
        self.bounds: dict[str, float] = {name: float(bound) for name, bound in named.items()}

    @property
    def of_kl(self) -> dict[Of, float]:
        """The bounds on the KL."""
        return {name: self.bounds[name] for name in KL if name in self.bounds}

    @property
    def of_metrics(self) -> dict[str, float]:
        """The others."""
        return {name: bound for name, bound in self.bounds.items() if name not in KL}

    def effect(self, names: list[str]) -> str:
        """The first of evaluate's metrics that is not in the budget: the effect.

        Raises:
            ValueError: there is none; or the budget names what is no metric.
        """
        if unknown := [name for name in self.of_metrics if name not in names]:
            raise ValueError(f"budget: {unknown} are neither {' nor '.join(KL)} nor among evaluate's metrics, {names}")
        free = [name for name in names if name not in self.bounds]
        if not free:
            raise ValueError(f"evaluate: every metric, {names}, is in the budget, and none is left as the effect")
        return free[0]


def share(value: float, bound: float) -> float:
    """How much of a bound is used up; more than 1 is over it."""
    if value <= 0 or math.isinf(bound):
        return 0.0
    return value / bound if bound else math.inf
