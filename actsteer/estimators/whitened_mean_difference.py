"""WhitenedMeanDifference: the direction of linear discriminant analysis."""

from __future__ import annotations

from typing import final

from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import Reads, estimate, shown, solved
from actsteer.estimators.shrinkage import check_shrinkage, shrunk
from actsteer.vectors.described import with_offsets
from actsteer.vectors.vector import SteeringVector


@final
class WhitenedMeanDifference:
    """v = Σ⁻¹ (μ₊ - μ₋), the direction along which two classes with one covariance separate best (Fisher 1936).

    Σ is the pooled within-class covariance S = (S₊ + S₋) / (n₊ + n₋ - 2), shrunk toward a multiple of the identity:
    Σ = (1 - ρ) S + ρ (tr S / d) I. Needs statistics with covariance. It tells the rows apart, as a gate
    must; added to the activations, it need not be the shift that changes the model's answer. The metadata has
    b = -v·(μ₊ + μ₋) / 2 as "offset SITE": σ(h·v + b) is how likely h is of the positive side, of two Gaussian ones that
    are equally frequent, so that `ProbeAbove` and `AtSites.soft` read it.

    Args:
        shrinkage: ρ in [0, 1]; None takes the one of least expected error, from the sums of fourth powers that
            `collect` keeps beside the covariance (Ledoit & Wolf 2004).

    Raises:
        StatisticsError: no covariance was collected, or Σ is singular.

    >>> import torch
    >>> from actsteer.collecting.moments import Moments
    >>> positive = Statistics({"2": Moments.of(torch.tensor([[2.0, 1.0], [2.0, -1.0]]), covariance=True)})
    >>> negative = Statistics({"2": Moments.of(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), covariance=True)})
    >>> WhitenedMeanDifference(shrinkage=0.0)(positive=positive, negative=negative)["2"]
    tensor([ 4., -2.])
    """

    reads: Reads = "covariance"

    __repr__ = shown

    def __init__(self, *, shrinkage: float | None = None) -> None:
        check_shrinkage(shrinkage)
        self.shrinkage = shrinkage

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The discriminant direction at every site."""
        found = estimate(self, self._direction, positive=positive, negative=negative)
        middles = {site: (positive[site].mean + negative[site].mean) / 2 for site in found}
        offsets = {site: float(-middle @ found[site].to(middle)) for site, middle in middles.items()}
        return SteeringVector({site: found[site] for site in found}, metadata=with_offsets(found.metadata, offsets))

    def _direction(self, positive: Moments, negative: Moments) -> Tensor:
        degrees = positive.count + negative.count - 2
        if degrees < 1:
            raise StatisticsError("one row on either side says nothing about the covariance; collect more")
        scatter = positive.scatter.add_(negative.scatter)
        rows, fourth = degrees + 2, positive.fourth + negative.fourth
        covariance = shrunk(scatter, fourth, rows=rows, degrees=degrees, shrinkage=self.shrinkage)
        return solved(covariance, positive.mean - negative.mean, rows=rows)
