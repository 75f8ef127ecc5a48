"""WhitenedMeanDifference: the direction of linear discriminant analysis."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import estimate
from actsteer.vectors.vector import SteeringVector


@final
class WhitenedMeanDifference:
    """v = Σ⁻¹ (μ₊ - μ₋), the direction along which two classes with one covariance separate best (Fisher 1936).

    Σ is the pooled within-class covariance S = (S₊ + S₋) / (n₊ + n₋ - 2), shrunk toward a multiple of the identity:
    Σ = (1 - ρ) S + ρ (tr S / d) I. Needs statistics with covariance. As a gate's direction it tells the rows apart;
    as what is added it need not be the shift that changes the model's answer.

    Args:
        shrinkage: ρ in [0, 1]; None takes the oracle-approximating estimate (Chen, Wiesel, Eldar & Hero 2010).

    Raises:
        StatisticsError: no covariance was collected, or Σ is singular.

    >>> from actsteer.collecting.moments import Moments
    >>> positive = Statistics({"2": Moments.of(torch.tensor([[2.0, 1.0], [2.0, -1.0]]), covariance=True)})
    >>> negative = Statistics({"2": Moments.of(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), covariance=True)})
    >>> WhitenedMeanDifference(shrinkage=0.0)(positive=positive, negative=negative)["2"]
    tensor([ 4., -2.])
    """

    needs_covariance = True

    def __init__(self, *, shrinkage: float | None = None) -> None:
        if shrinkage is not None and not 0.0 <= shrinkage <= 1.0:
            raise ValueError(f"shrinkage: expected a number in [0, 1] or None, got {shrinkage}")
        self.shrinkage = shrinkage

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The discriminant direction at every site."""
        return estimate(self, self._direction, positive=positive, negative=negative)

    def _direction(self, positive: Moments, negative: Moments) -> Tensor:
        degrees = positive.count + negative.count - 2
        if degrees < 1:
            raise StatisticsError("one row on either side says nothing about the covariance; collect more")
        pooled = (positive.scatter + negative.scatter) / degrees
        d = len(pooled)
        rho = _oracle_approximating(pooled, degrees) if self.shrinkage is None else self.shrinkage
        shrunk = (1 - rho) * pooled + rho * (pooled.trace() / d) * torch.eye(d).to(pooled)
        factor, info = torch.linalg.cholesky_ex(shrunk)
        rounding = d * torch.finfo(shrunk.dtype).eps * shrunk.diagonal().max()
        if int(info) or bool(factor.diagonal().min() ** 2 <= rounding):
            raise StatisticsError(
                f"the covariance of {d} features from {degrees + 2} rows is singular; shrink more, or collect more rows"
            )
        return torch.cholesky_solve((positive.mean - negative.mean)[:, None], factor)[:, 0]


def _oracle_approximating(covariance: Tensor, n: int) -> float:
    d = len(covariance)
    square, trace_square = float((covariance**2).sum()), float(covariance.trace() ** 2)
    spread = (n + 1 - 2 / d) * (square - trace_square / d)
    return min(1.0, ((1 - 2 / d) * square + trace_square) / spread) if spread > 0 else 1.0
