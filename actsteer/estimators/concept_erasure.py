"""ConceptErasure: an edit after which no linear probe can tell the classes apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.classes import ClassStatistics
from actsteer.collecting.moments import Moments, wider
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import Reads, check_alike, shown
from actsteer.estimators.shrinkage import check_shrinkage, shrunk
from actsteer.steering.interventions.low_rank import LowRank


@final
class ConceptErasure:
    """The smallest affine edit that makes the means of all classes equal: r(x) = x - W⁺ P W (x - μ).

    W = Σ^(-1/2) with Σ the covariance of all rows and μ their mean; P projects on the span of W (μ_k - μ). For two
    classes it takes away one direction, δ (δᵀ Σ⁻¹ (x - μ)) / (δᵀ Σ⁻¹ δ) with δ = μ₊ - μ₋. No linear classifier does
    better on the edited rows than one that does not look at them, and the edit's mean square is the least possible.
    Needs statistics with covariance; both sides swapped give the same edit, in the dtype of the rows or, if that is
    narrower, torch's default one. With `fit(..., one_by_one=True)` it scrubs a concept from all sites of a model.
    Source: LEACE, Belrose et al. 2023 (arXiv 2306.03819).

    Args:
        shrinkage: ρ in [0, 1], with (1 - ρ) Σ + ρ (tr Σ / d) I in the place of Σ, where the rows are few for so many
            features; None takes the ρ of least expected error (Ledoit & Wolf 2004). The means become equal with any of
            them. 1 is the orthogonal projection, which reads variances alone.
        tolerance: variances below this share of the largest one count as none: the rows do not vary that way, and what
            the means differ by in such a direction stays.

    Raises:
        StatisticsError: one class alone, no covariance, or rows that do not vary.

    Warns:
        UserWarning: at a site the means are equal already: what the classes explain of the variance is less than the
            rounding of the rows' dtype, or of float32 if that is narrower. The edit changes nothing there.

    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 6.0]])
    >>> sides = [Statistics({"2": Moments.of(rows + side, covariance=True)}) for side in (0, 4)]
    >>> erasure = ConceptErasure()(positive=sides[1], negative=sides[0])
    >>> reads, adds, offsets = erasure["2"]
    >>> means = torch.stack([side["2"].mean.float() for side in sides])
    >>> means + (means @ reads.T + offsets) @ adds  # both at the mean of all rows
    tensor([[4., 5.], [4., 5.]])
    """

    __repr__ = shown

    def __init__(self, *, shrinkage: float | None = 0.0, tolerance: float = 1e-10) -> None:
        check_shrinkage(shrinkage)
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance}")
        self.shrinkage, self.tolerance = shrinkage, tolerance
        self.reads: Reads = "variances" if shrinkage == 1 else "covariance"

    def __call__(self, *, positive: Statistics, negative: Statistics) -> LowRank:
        """The edit that erases which side a row is from."""
        return self._erased([positive, negative])

    def classes(self, statistics: ClassStatistics) -> LowRank:
        """The edit that erases which of several classes a row is from; of rank k - 1 or less."""
        return self._erased(list(statistics.values()))

    def _erased(self, parts: Sequence[Statistics]) -> LowRank:
        if len(parts) < 2:
            raise StatisticsError(f"expected two classes or more, got {len(parts)}; there is nothing to tell apart")
        for part in parts[1:]:
            check_alike(parts[0], part)
        sites = {site: self._site(site, [part[site] for part in parts]) for site in parts[0]}
        if still := [site for site, (reads, _, _) in sites.items() if not bool(reads.any())]:
            warnings.warn(f"the classes have one mean already, and nothing is erased at {still}", stacklevel=3)
        shared = dict(set.intersection(*(set(part.metadata.items()) for part in parts)))
        return LowRank(sites, metadata=shared | {"estimator": type(self).__name__})

    def _site(self, site: str, parts: Sequence[Moments]) -> tuple[Tensor, Tensor, Tensor]:
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.merge(part)
        roots, vectors = self._deviations(site, whole)
        # weighted by the size of the class, as the cross-covariance with the labels is
        means = torch.stack([(part.mean - whole.mean) * (part.count / whole.count) ** 0.5 for part in parts])
        white = means @ vectors / roots
        _, strengths, basis = torch.linalg.svd(white, full_matrices=False)
        # a strength squared is the share of the variance there that the classes explain
        rounding = torch.finfo(wider(whole.dtype or torch.float64, torch.float32)).eps
        found = strengths[: len(parts) - 1].square() > rounding
        basis = basis[: len(parts) - 1][found] if bool(found.any()) else torch.zeros_like(basis[:1])
        reads, adds = basis / roots @ vectors.T, -basis * roots @ vectors.T
        offsets = -reads @ whole.mean
        kind = wider(whole.dtype or torch.float64, torch.get_default_dtype())
        return reads.to(kind), adds.to(kind), offsets.to(kind)

    def _deviations(self, site: str, whole: Moments) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
        """The standard deviations along the directions in which the rows vary, and these."""
        if self.shrinkage == 1:
            values, vectors = whole.variance.mean().expand(whole.d), torch.eye(whole.d).to(whole.mean)
        else:
            covariance = shrunk(
                whole.scatter, whole.fourth, rows=whole.count, degrees=whole.count - 1, shrinkage=self.shrinkage
            )
            values, vectors = torch.linalg.eigh(covariance)
        varies = values > self.tolerance * values[-1]
        if not bool(varies.any()):
            raise StatisticsError(f"site {site!r}: the rows do not vary; there is nothing to erase")
        return values[varies].sqrt(), vectors[:, varies]
