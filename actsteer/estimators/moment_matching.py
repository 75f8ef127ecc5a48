"""MomentMatching: the affine edit that gives one side's activations the mean and the covariance of the other."""

from __future__ import annotations

from typing import Literal, TypeAlias, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.estimators.estimator import check_alike, described, shown
from actsteer.steering.interventions.affine import Affine

Matched: TypeAlias = Literal["means", "variances", "covariance"]


@final
class MomentMatching:
    """W h + b with b = μ₊ - W μ₋, so that the negative side's activations get the positive side's moments.

        means        W = 1
        variances    W = diag(σ₊ / σ₋), feature by feature
        covariance   W = Σ₋^-½ (Σ₋^½ Σ₊ Σ₋^½)^½ Σ₋^-½, the map that moves Gaussian rows least

    Features and directions in which the negative side does not vary stay as they are.

    Args:
        match: up to which moments both sides become alike; it is also what is collected.

    Raises:
        StatisticsError: what is matched was not collected.

    Source: MiMiC, Singh et al. 2024.

    >>> from actsteer import collect, fit
    >>> from torch import nn
    >>> model, rows = nn.Sequential(nn.Identity()), torch.tensor([[-1.0], [1.0]])
    >>> edit = fit(model, positive=3 * rows + 5, negative=rows, sites="0", estimator=MomentMatching())
    >>> edit.at("0")(rows, rows[0], torch.tensor(1.0))
    tensor([[2.],
            [8.]])
    """

    __repr__ = shown

    def __init__(self, *, match: Matched = "covariance") -> None:
        if match not in get_args(Matched):
            raise ValueError(f"match: expected one of {', '.join(map(repr, get_args(Matched)))}, got {match!r}")
        self.match = match
        self.reads: Matched = match

    def __call__(self, *, positive: Statistics, negative: Statistics) -> Affine:
        """The map at every site."""
        check_alike(positive, negative)
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for site in positive:
            weight = self._weight(positive[site], negative[site])
            bias = positive[site].mean - weight @ negative[site].mean
            maps[site] = (weight, bias)
        return Affine(maps, metadata=described(self, positive=positive, negative=negative))

    def _weight(self, positive: Moments, negative: Moments) -> Float[Tensor, "d d"]:
        if self.reads == "means":
            return torch.eye(positive.d).to(positive.mean)
        if self.reads == "variances":
            source, target = negative.variance, positive.variance
            return torch.where(source > 0, target / source, 1).sqrt().diag()
        return _transport(negative.covariance, positive.covariance)


def _transport(source: Float[Tensor, "d d"], target: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
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
