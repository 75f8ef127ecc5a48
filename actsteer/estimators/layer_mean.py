"""LayerMean: one number per site, given to every feature."""

from __future__ import annotations

from typing import final

from actsteer.collecting.statistics import Statistics
from actsteer.estimators.estimator import Reads, estimate, shown
from actsteer.vectors.vector import SteeringVector


@final
class LayerMean:
    """v = (mean of μ₊ - mean of μ₋) · 1: the mean over all features of a site, the same for each of them.

    The published MNIST steering notebooks compute it: one number per site, where `MeanDifference` has d. Use it to
    reproduce them, or as a baseline that shows what the other numbers contribute.

    >>> import torch
    >>> from actsteer.collecting.moments import Moments
    >>> rows = torch.tensor([[1.0, 3.0]]).repeat(2, 1)
    >>> LayerMean()(positive=Statistics({"2": Moments.of(rows)}), negative=Statistics({"2": Moments.of(0 * rows)}))["2"]
    tensor([2., 2.])
    """

    reads: Reads = "means"

    __repr__ = shown

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The vector of layer means at every site."""
        return estimate(
            self,
            lambda p, n: (p.mean.mean() - n.mean.mean()).expand_as(p.mean),
            positive=positive,
            negative=negative,
        )
