"""RidgeDirection: the weights of a linear regression on which side a row is from."""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.estimators.estimator import Reads, estimate, shown, solved
from actsteer.vectors.vector import SteeringVector


@final
class RidgeDirection:
    """v = argmin Σ (y - x·v - b)² + α ‖v‖² with y = +1 for positive rows and -1 for negative ones.

    In closed form v = (T + α I)⁻¹ δ · 2 n₊ n₋ / n, with δ = μ₊ - μ₋ and T the scatter of all rows about their common
    mean. Needs statistics with covariance. Source: ridge regression, Hoerl & Kennard 1970.

    Args:
        alpha: α >= 0, in the units of the scatter.

    Raises:
        StatisticsError: no covariance was collected, or T + α I is singular.

    >>> import torch
    >>> from actsteer.collecting.moments import Moments
    >>> ones, zeros = (Statistics({"2": Moments.of(side * torch.ones(4, 1), covariance=True)}) for side in (1, 0))
    >>> RidgeDirection(alpha=2.0)(positive=ones, negative=zeros)["2"]  # scatter 2, and 2 · 4 · 4 / 8 = 4 times 1
    tensor([1.])
    """

    reads: Reads = "covariance"

    __repr__ = shown

    def __init__(self, *, alpha: float = 1.0) -> None:
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha: expected a number >= 0, got {alpha}")
        self.alpha = alpha

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The regression's weights at every site."""
        return estimate(self, self._direction, positive=positive, negative=negative)

    def _direction(self, positive: Moments, negative: Moments) -> Tensor:
        together = positive.merge(negative)
        scatter = together.scatter
        scatter.diagonal().add_(self.alpha)
        difference = positive.mean - negative.mean
        weight = 2 * positive.count * negative.count / together.count
        return solved(scatter, weight * difference, rows=together.count)
