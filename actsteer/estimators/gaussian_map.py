"""GaussianMap: the affine edit that gives one side's activations the mean and the covariance of the other."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.estimators.estimator import Reads, check_alike, described, dtype_of, shown
from actsteer.steering.interventions.affine import Affine


@final
class GaussianMap:
    """μ₊ + A (h - μ₋): of all maps that give the negative rows the positive rows' moments, that which moves them least.

        A = Σ₋^-½ (Σ₋^½ Σ₊ Σ₋^½)^½ Σ₋^-½         the optimal transport of one Gaussian to another
        A = diag(σ₊ / σ₋)                        with `diagonal`: the same for each feature by itself

    It needs no pairs. At c in [0, 1] a row has gone that share of its way. Where the negative side does not vary, no
    affine map can make it vary: there A is 1, and rows move by the means alone; so it is where there are fewer rows
    than features, and the moved rows have Σ₊ as far as it lies in the span of Σ₋.

    Args:
        diagonal: match the variance of each feature, and not how they vary together, in O(d) memory for the
            statistics; few rows are enough.

    Raises:
        StatisticsError: what is matched was not collected, or there is a single row.

    Source: Linear-AcT (arXiv 2410.23054, 2025), with the means and variances in the place of sorted rows; MiMiC, Singh
    et al. 2024; the map of Gaussians, Knott & Smith 1984.

    >>> from actsteer import collect, fit
    >>> from torch import nn
    >>> model, rows = nn.Sequential(nn.Identity()), torch.tensor([[-1.0], [1.0]])
    >>> edit = fit(model, positive=3 * rows + 5, negative=rows, sites="0", estimator=GaussianMap())
    >>> edit.at("0")(rows, rows[0], torch.tensor(1.0))
    tensor([[2.],
            [8.]])
    """

    __repr__ = shown

    def __init__(self, *, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        self.reads: Reads = "variances" if diagonal else "covariance"

    def __call__(self, *, positive: Statistics, negative: Statistics) -> Affine:
        """The map at every site."""
        check_alike(positive, negative)
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for site in positive:
            toward, away = positive[site], negative[site]
            weight = self._weight(toward, away)
            kind = dtype_of(toward, away)
            maps[site] = (weight.to(kind), (toward.mean - weight @ away.mean).to(kind))
        return Affine(maps, metadata=described(self, positive=positive, negative=negative))

    def _weight(self, positive: Moments, negative: Moments) -> Float[Tensor, "d d"]:
        if self.diagonal:
            source, target = negative.variance, positive.variance
            return torch.where(source > 0, target / source, 1).sqrt().diag()
        return transport(negative.covariance, positive.covariance)


def transport(source: Float[Tensor, "d d"], target: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric map from one covariance to another; 1 where the source does not vary."""
    values, vectors = torch.linalg.eigh(source)
    varies = values > values.max().clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    basis, deviations = vectors[:, varies], values[varies].sqrt()
    scaled = deviations[:, None] * (basis.T @ target @ basis) * deviations
    within, turns = torch.linalg.eigh(scaled)
    root = (turns * within.clamp(min=0).sqrt()) @ turns.T
    still = torch.eye(len(values)).to(source) - basis @ basis.T
    moved: Tensor = still + basis @ (root / deviations[:, None] / deviations) @ basis.T
    return moved
