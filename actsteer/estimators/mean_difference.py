"""MeanDifference: from the mean of the negative side to the mean of the positive one."""

from __future__ import annotations

from typing import final

from actsteer.collecting.statistics import Statistics
from actsteer.estimators.estimator import Reads, estimate, shown
from actsteer.vectors.vector import SteeringVector


@final
class MeanDifference:
    """v = μ₊ - μ₋, one number per feature, in the activation's units.

    Also called DiffMean, CAA or, from a single pair, ActAdd. Source: Rimsky et al. 2023; Marks & Tegmark 2023.

    >>> import torch
    >>> from actsteer.collecting.moments import Moments
    >>> ones, zeros = (Statistics({"2": Moments.of(row.repeat(3, 1))}) for row in (torch.ones(2), torch.zeros(2)))
    >>> MeanDifference()(positive=ones, negative=zeros)["2"]
    tensor([1., 1.])
    """

    reads: Reads = "means"

    __repr__ = shown

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The vector of mean differences at every site."""
        return estimate(self, lambda p, n: p.mean - n.mean, positive=positive, negative=negative)
