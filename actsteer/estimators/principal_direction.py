"""PrincipalDirection: the direction along which the activations vary most."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import Reads, estimate, shown
from actsteer.vectors.vector import SteeringVector


@final
class PrincipalDirection:
    """v = the first principal component, of norm 1, with the sign by which the positive side projects higher.

    Without `paired` it is the component of the rows of both sides together, about their common mean. With `paired` it
    is the component of the differences x₊ - x₋ of pairs of rows, about zero, so that what both rows of a pair share
    does not count; `fit` and `collect_differences` make the differences.

    Of pairs about the differences' mean, `centred`, it is the component along which they vary, whatever they have in
    common: repeng's "pca_diff", where that about zero is its "pca_center".

    Also called LAT, or the reading vector. Source: representation engineering (RepE), Zou et al. 2023.

    Args:
        paired: read "pairs": the statistics of the differences (positive) and of their negatives (negative).
        centred: of pairs, take their differences about their mean.

    Raises:
        StatisticsError: no covariance was collected, the rows do not vary, or are not `paired`.
        ValueError: `centred` without `paired`, where the mean is taken out anyway.

    >>> from actsteer.collecting.moments import Moments
    >>> rows = torch.tensor([[3.0, 0.0], [5.0, 0.5], [4.0, -0.5]])
    >>> sides = (Statistics({"2": Moments.of(sign * rows, covariance=True)}) for sign in (1, -1))
    >>> PrincipalDirection()(positive=next(sides), negative=next(sides))["2"].round(decimals=2)
    tensor([1.0000, 0.0100])
    """

    __repr__ = shown

    def __init__(self, *, paired: bool = False, centred: bool = False) -> None:
        if centred and not paired:
            raise ValueError("centred: it is for pairs; without them the rows' common mean is taken out anyway")
        self.paired, self.centred = paired, centred
        self.reads: Reads = "pairs" if paired else "covariance"

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The principal direction at every site."""
        for site in positive if self.paired else ():
            if site in negative and not _are_of_pairs(positive[site], negative[site]):
                raise StatisticsError(
                    f"site {site!r}: expected the differences of pairs and their negatives; see collect_differences"
                )
        return estimate(self, self._direction, positive=positive, negative=negative)

    def _direction(self, positive: Moments, negative: Moments) -> Tensor:
        values, components = torch.linalg.eigh((positive if self.centred else positive.merge(negative)).scatter)
        if float(values[-1]) <= 0.0:
            raise StatisticsError("the rows do not vary, so no direction is the principal one; collect other rows")
        component: Tensor = components[:, -1]
        return -component if float(component @ (positive.mean - negative.mean)) < 0 else component


def _are_of_pairs(positive: Moments, negative: Moments) -> bool:
    return positive.count == negative.count and torch.equal(positive.mean, -negative.mean)
