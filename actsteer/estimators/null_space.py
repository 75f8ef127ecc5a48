"""NullSpace: a vector that is added to some activations, and leaves others alone."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError, close_names
from actsteer.estimators.estimator import Reads, check_finite, second_moment, shown, with_metadata
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.vectors.vector import SteeringVector


@final
class NullSpace:
    """h + c · (w·h) v with w·h near 1 on the positive side, to be steered, and near 0 on the negative, to be left.

    w lies in the null space of the negative activations: P projects on the eigenvectors of E₋[h hᵀ] whose eigenvalues
    are at most a share `tolerance` of the largest, and w = P (P E₊[h hᵀ] P + λ I)⁻¹ P μ₊ is the ridge regression of 1
    on the positive activations there. With a `tolerance` as small as rounding, rows in the span of the negative
    activations stay as they are. Where the negative activations fill the space, a larger one makes room: they are
    moved a little, the positive ones more.

    Args:
        vector: v, what is added to a row that is steered in full.
        tolerance: the largest share of the largest eigenvalue that counts as none.
        ridge: λ as a share of the mean of the positive second moment's diagonal.

    Raises:
        StatisticsError: no covariance was collected; the negative activations leave no null space.
        SiteNotFoundError, ShapeError: the statistics lack a site of the vector, or have another size there.

    Source: AlphaSteer, Sheng et al. 2025, with the learned map replaced by one of rank one.

    >>> toward, away = (Statistics({"0": Moments.of(torch.tensor(rows), covariance=True)}) for rows in (
    ...     [[1.0, 2.0], [1.2, 2.0]], [[1.0, 0.0], [-3.0, 0.0]]))
    >>> edit = NullSpace(SteeringVector({"0": torch.tensor([5.0, 0.0])}))(positive=toward, negative=away)
    >>> h, c = torch.tensor([[1.0, 2.0], [7.0, 0.0]]), torch.tensor(1.0)
    >>> edit.at("0")(h, h[0], c).round(decimals=1)
    tensor([[6., 2.],
            [7., 0.]])
    """

    reads: Reads = "covariance"

    __repr__ = shown

    def __init__(self, vector: SteeringVector, *, tolerance: float = 1e-6, ridge: float = 1e-6) -> None:
        if not (0 <= tolerance < 1 and ridge > 0):
            raise ValueError(f"expected tolerance in [0, 1) and ridge > 0, got {tolerance=}, {ridge=}")
        self.vector, self.tolerance, self.ridge = vector, tolerance, ridge

    def __call__(self, *, positive: Statistics, negative: Statistics) -> LowRank:
        """The edit at every site of the vector."""
        for site in self.vector:
            for side, statistics in (("positive", positive), ("negative", negative)):
                if site not in statistics:
                    near = close_names(site, statistics)
                    raise SiteNotFoundError(f"no {side} statistics for site {site!r}. {near}")
            check_finite(site, positive=positive[site], negative=negative[site])
            sizes = positive[site].d, negative[site].d
            if set(sizes) != {len(self.vector[site])}:
                raise ShapeError(
                    f"site {site!r}: {sizes[0]} features on the positive side, {sizes[1]} on the negative, and "
                    f"{len(self.vector[site])} in the vector; is it from another model?"
                )
        parts = {site: self._site(site, positive[site], negative[site]) for site in self.vector}
        edit = LowRank(parts, metadata=self.vector.metadata | {"estimator": "NullSpace"})
        shared = dict(positive.metadata.items() & negative.metadata.items())
        return with_metadata(edit, shared, concept=self.vector.concept)

    def _site(self, site: str, positive: Moments, negative: Moments) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(second_moment(negative))
        free = vectors[:, values <= self.tolerance * values[-1]]
        if not free.shape[1]:
            raise StatisticsError(
                f"site {site!r}: the negative activations fill all {len(values)} dimensions, so that every edit "
                "changes them; give a larger tolerance, or fewer kinds of them"
            )
        within = free.T @ second_moment(positive) @ free
        penalty = self.ridge * within.diagonal().mean().clamp(min=torch.finfo(within.dtype).tiny)
        within.diagonal().add_(penalty)
        reads = free @ torch.linalg.solve(within, free.T @ positive.mean)
        direction = self.vector[site]
        return reads[None].to(direction), direction[None], direction.new_zeros(1)
