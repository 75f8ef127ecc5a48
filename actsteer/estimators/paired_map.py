"""PairedMap: the affine edit that takes one row of every pair to the other, of full rank or of a low one."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.pairs import JOINT
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import Reads, check_alike, described, dtype_of, ridged, shown
from actsteer.steering.interventions.affine import Affine
from actsteer.steering.interventions.low_rank import LowRank


@final
class PairedMap:
    """h + Wᵀ(h - μ₋) + b, the ridge regression of what the positive row of a pair adds to the negative one, h.

        W = (S + λ I)⁻¹ S',   S = Σ (h₋ - μ₋)(h₋ - μ₋)ᵀ,   S' = Σ (h₋ - μ₋)(h₊ - h₋)ᵀ,   b = μ₊ - μ₋

    It is an `Affine`, and of a `rank` the `LowRank` of as many directions whose penalised squared error is the least
    possible: what is added is projected on the first eigenvectors of its fitted second moment, Wᵀ(S + λ I)W + n b bᵀ.
    The offset counts as what is added too: of rank 1 the edit is h + a(h) v, with a(h) an affine function of h. The
    larger λ, the nearer to adding b alone, which is `MeanDifference`.

    `fit` pairs the first row of `positive` with the first of `negative`, and so on: the same inputs with and without a
    prompt, or before and after a change of theirs; see `collect_joint`.

    Args:
        rank: how many directions are added along; None for all, and W as a whole.
        ridge: λ as a share of the mean of S's diagonal, >= 0.

    Raises:
        StatisticsError: the statistics are not those of pairs, or S is singular and needs a ridge.

    Source: reduced-rank regression, Izenman 1975, with the ridge of Mukherjee & Zhu 2011. PSR (arXiv 2605.03907, 2026)
    trains an edit of the form that rank 1 has, to imitate a prompt.

    >>> from torch import nn
    >>> from actsteer import Steerer, fit
    >>> model, x = nn.Sequential(nn.Identity()), torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 2.0]])
    >>> edit = fit(model, positive=x.flip(1) + 1, negative=x, sites="0", estimator=PairedMap(ridge=0.0))
    >>> with Steerer(model, edit):
    ...     model(torch.tensor([[7.0, 5.0]])).round(decimals=3)
    tensor([[6., 8.]])
    """

    reads: Reads = "joint"

    __repr__ = shown

    def __init__(self, *, rank: int | None = None, ridge: float = 1e-2) -> None:
        if rank is not None and not (isinstance(rank, int) and rank >= 1):
            raise ValueError(f"rank: expected None or 1 or more, got {rank}")
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge: expected a share >= 0, got {ridge}")
        self.rank, self.ridge = rank, ridge

    def __call__(self, *, positive: Statistics, negative: Statistics) -> Affine | LowRank:
        """The map at every site; both sides are the same joint statistics."""
        check_alike(positive, negative)
        is_joint = all(side.metadata.items() >= JOINT.items() for side in (positive, negative))
        if not (is_joint and all(torch.equal(positive[site].mean, negative[site].mean) for site in positive)):
            raise StatisticsError(
                "expected the statistics of pairs, side by side, and the same as both sides; see collect_joint"
            )
        metadata = described(self, positive=positive, negative=negative)
        if self.rank is None:
            return Affine({site: self._whole(site, positive[site]) for site in positive}, metadata=metadata)
        return LowRank({site: self._cut(site, positive[site], self.rank) for site in positive}, metadata=metadata)

    def _whole(self, site: str, joint: Moments) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]:
        weight, offset, _ = self._added(site, joint)
        kind = dtype_of(joint)
        return (torch.eye(len(offset)).to(offset) + weight.T).to(kind), offset.to(kind)

    def _cut(
        self, site: str, joint: Moments, rank: int
    ) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"], Float[Tensor, " r"]]:
        weight, offset, second = self._added(site, joint)
        adds = torch.linalg.eigh(second).eigenvectors.flip(1).T[:rank]
        kind = dtype_of(joint)
        return (adds @ weight.T).to(kind), adds.to(kind), (adds @ offset).to(kind)

    def _added(
        self, site: str, joint: Moments
    ) -> tuple[Float[Tensor, "d d"], Float[Tensor, " d"], Float[Tensor, "d d"]]:
        """What is added to h, Wᵀ h + offset, and its penalised second moment."""
        d = joint.d // 2
        toward, away = joint.mean.split(d)
        scatter = joint.scatter
        within, across = scatter[d:, d:], scatter[d:, :d] - scatter[d:, d:]
        weight = ridged(within, across, ridge=self.ridge, site=site, rows=joint.count)
        shift = toward - away
        second = across.T @ weight + joint.count * torch.outer(shift, shift)
        return weight, shift - away @ weight, second
