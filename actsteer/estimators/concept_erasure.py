"""ConceptErasure: an edit after which no linear probe can tell the classes apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from actsteer.collecting.classes import ClassStatistics
from actsteer.collecting.moments import Moments, wider
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import Reads, check_alike, shown
from actsteer.steering.interventions.low_rank import LowRank


@final
class ConceptErasure:
    """The smallest affine edit that makes the means of all classes equal: r(x) = x - W⁺ P W (x - μ).

    W = Σ^(-1/2) with Σ the covariance of all rows and μ their mean; P projects on the span of W (μ_k - μ). For two
    classes it takes away one direction, δ (δᵀ Σ⁻¹ (x - μ)) / (δᵀ Σ⁻¹ δ) with δ = μ₊ - μ₋. No linear classifier does
    better on the edited rows than one that does not look at them, and the edit's mean square is the least possible.
    Needs statistics with covariance; both sides swapped give the same edit, in the dtype of the rows or, if that is
    narrower, torch's default one. Source: LEACE, Belrose et al. 2023.

    Args:
        tolerance: variances below this share of the largest one count as none: the rows do not vary that way, and what
            the means differ by in such a direction stays.

    Raises:
        StatisticsError: one class alone, no covariance, rows that do not vary, or means that are equal already.

    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 6.0]])
    >>> sides = [Statistics({"2": Moments.of(rows + side, covariance=True)}) for side in (0, 4)]
    >>> erasure = ConceptErasure()(positive=sides[1], negative=sides[0])
    >>> reads, adds, offsets = erasure["2"]
    >>> means = torch.stack([side["2"].mean.float() for side in sides])
    >>> means + (means @ reads.T + offsets) @ adds  # both at the mean of all rows
    tensor([[4., 5.], [4., 5.]])
    """

    reads: Reads = "covariance"

    __repr__ = shown

    def __init__(self, *, tolerance: float = 1e-10) -> None:
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance: expected a number in [0, 1), got {tolerance}")
        self.tolerance = tolerance

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
        shared = dict(set.intersection(*(set(part.metadata.items()) for part in parts)))
        return LowRank(sites, metadata=shared | {"estimator": type(self).__name__})

    def _site(self, site: str, parts: Sequence[Moments]) -> tuple[Tensor, Tensor, Tensor]:
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.merge(part)
        values, vectors = torch.linalg.eigh(whole.covariance)
        varies = values > self.tolerance * values[-1]
        if not bool(varies.any()):
            raise StatisticsError(f"site {site!r}: the rows do not vary; there is nothing to erase")
        roots, vectors = values[varies].sqrt(), vectors[:, varies]
        # weighted by the size of the class, as the cross-covariance with the labels is
        means = torch.stack([(part.mean - whole.mean) * (part.count / whole.count) ** 0.5 for part in parts])
        white = means @ vectors / roots
        _, strengths, basis = torch.linalg.svd(white, full_matrices=False)
        basis = basis[: len(parts) - 1][strengths[: len(parts) - 1] > 1e-9 * strengths.max().clamp(min=1e-12)]
        if not len(basis) or float(strengths[0]) <= 1e-12:
            raise StatisticsError(f"site {site!r}: the classes have one mean already; there is nothing to erase")
        reads, adds = basis / roots @ vectors.T, -basis * roots @ vectors.T
        offsets = -reads @ whole.mean
        kind = wider(whole.dtype or torch.float64, torch.get_default_dtype())
        return reads.to(kind), adds.to(kind), offsets.to(kind)
