"""Moments and Statistics: what a pass over the data leaves behind, in memory that does not grow with the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError, close_names


@final
class Moments:
    """Count, mean and, when asked for, scatter of the activations at one site, in float64.

    Two parts merge exactly as if their rows had been seen together (Chan, Golub & LeVeque 1979):

        n = n_a + n_b,   δ = mean_b - mean_a,   mean = mean_a + δ n_b / n,   S = S_a + S_b + δ δᵀ n_a n_b / n

    >>> m = Moments.of(torch.tensor([[0.0, 2.0], [4.0, 2.0]]), covariance=True)
    >>> m.count, m.mean.tolist(), m.covariance.tolist()
    (2, [2.0, 2.0], [[8.0, 0.0], [0.0, 0.0]])
    """

    __slots__ = ("_mean", "_scatter", "count")

    def __init__(self, count: int, mean: Float[Tensor, " d"], scatter: Float[Tensor, "d d"] | None) -> None:
        self.count = count
        self._mean = mean.clone()
        self._scatter = None if scatter is None else scatter.clone()

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], *, covariance: bool = False) -> Moments:
        """The moments of these rows, computed in float64 with the mean subtracted first."""
        if len(rows) == 0:
            raise StatisticsError(f"expected rows of shape (n, d) with n >= 1, got {tuple(rows.shape)}")
        exact = rows.double()
        mean = exact.mean(dim=0)
        centred = exact - mean if covariance else None
        return cls(len(rows), mean, None if centred is None else centred.T @ centred)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """The mean activation, shape (d,)."""
        return self._mean.clone()

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance, shape (d, d): the scatter divided by count - 1.

        Raises:
            StatisticsError: it was not collected, or there is a single row.
        """
        if self.count < 2:
            raise StatisticsError("the covariance of a single row is not defined; collect at least two")
        return self.scatter / (self.count - 1)

    @property
    def scatter(self) -> Float[Tensor, "d d"]:
        """The sum of (x - mean)(x - mean)ᵀ over the rows, shape (d, d)."""
        if self._scatter is None:
            raise StatisticsError("no covariance was collected; collect with covariance=True")
        return self._scatter.clone()

    def merge(self, other: Moments) -> Moments:
        """The moments of both parts together."""
        if self._mean.shape != other._mean.shape:
            raise ShapeError(
                f"{len(self._mean)} features against {len(other._mean)}; were they collected on one model?"
            )
        count = self.count + other.count
        delta = other._mean - self._mean
        scatter = None
        if self._scatter is not None and other._scatter is not None:
            scatter = self._scatter + other._scatter + torch.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, self._mean + delta * (other.count / count), scatter)

    def __repr__(self) -> str:
        return f"Moments(count={self.count}, d={len(self._mean)}, covariance={self._scatter is not None})"


@final
class Statistics:
    """Site -> Moments, and the fingerprint of the model that they were collected on.

    >>> stats = Statistics({"2": Moments.of(torch.zeros(3, 2))})
    >>> stats.sites, stats["2"].count
    (('2',), 3)
    """

    __slots__ = ("_metadata", "_moments")

    def __init__(self, moments: Mapping[str, Moments], *, metadata: Mapping[str, str] | None = None) -> None:
        self._moments = dict(moments)
        self._metadata = dict(metadata or {})

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in module order."""
        return tuple(self._moments)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata: the model's fingerprint, and the feature axis where it is not the last."""
        return dict(self._metadata)

    def __getitem__(self, site: str) -> Moments:
        if site not in self._moments:
            raise SiteNotFoundError(f"no statistics for site {site!r}. {close_names(site, self._moments)}")
        return self._moments[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both parts together; both cover the same sites of one model."""
        if set(self._moments) != set(other._moments):
            raise SiteNotFoundError(f"sites {self.sites} against {other.sites}; collect both parts at the same sites")
        if self._metadata != other._metadata:
            raise StatisticsError(f"{self._metadata} against {other._metadata}; these are of two different models")
        return Statistics({s: m.merge(other[s]) for s, m in self._moments.items()}, metadata=self._metadata)

    def __repr__(self) -> str:
        return f"Statistics({self._moments})"
