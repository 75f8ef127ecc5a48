"""What an estimator is: Statistics of two sides in, a SteeringVector out, and nothing kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError
from actsteer.vectors.vector import SteeringVector


@runtime_checkable
class Estimator(Protocol):
    """Turns the statistics of a positive and a negative side into a vector that points from negative to positive."""

    @property
    def needs_covariance(self) -> bool:
        """Whether the statistics must be collected with `covariance=True`."""
        ...

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The vector, in torch's default dtype."""
        ...


def estimate(
    estimator: Estimator,
    direction: Callable[[Moments, Moments], Tensor],
    *,
    positive: Statistics,
    negative: Statistics,
) -> SteeringVector:
    """Apply `direction(positive, negative)` at every site, and describe in the metadata where the vector comes from.

    Raises:
        SiteNotFoundError, ShapeError: the sides were collected at different sites, or have different sizes there.
    """
    check_alike(positive, negative)
    directions: dict[str, Tensor] = {}
    for site in positive:
        directions[site] = direction(positive[site], negative[site]).to(torch.get_default_dtype())
    shared = dict(positive.metadata.items() & negative.metadata.items())
    first = positive.sites[0]
    return SteeringVector(
        directions,
        metadata=shared
        | {
            "estimator": type(estimator).__name__,
            "positive count": str(positive[first].count),
            "negative count": str(negative[first].count),
        },
    )


def check_alike(positive: Statistics, negative: Statistics) -> None:
    """Raise unless both sides were collected at the same sites of the same sizes, and are finite."""
    if set(positive) != set(negative):
        raise SiteNotFoundError(
            f"positive has the sites {positive.sites}, negative {negative.sites}; collect both at the same sites"
        )
    if not len(positive):
        raise SiteNotFoundError("the statistics have no sites; collect them at one or more")
    for site in positive:
        if (toward := positive[site].d) != (away := negative[site].d):
            raise ShapeError(
                f"site {site!r}: positive has {toward} features, negative {away}; were they collected at sites of the "
                "same size?"
            )
        check_finite(site, positive=positive[site], negative=negative[site])


def check_finite(site: str, **sides: Moments) -> None:
    """Raise StatisticsError unless these moments are those of finite rows, of one or more."""
    for side, moments in sides.items():
        if not moments.count:
            raise StatisticsError(f"site {site!r}: the {side} side has no rows")
        sums = [moments.mean, moments.scatter] if moments.has_covariance else [moments.mean]
        if not all(bool(total.isfinite().all()) for total in sums):
            raise StatisticsError(
                f"site {site!r}: the {side} statistics are not finite; look for inf or nan in the data"
            )


def solved(matrix: Float[Tensor, "d d"], right: Float[Tensor, "d ..."], *, rows: int) -> Float[Tensor, "d ..."]:
    """The solution x of matrix · x = right, for a symmetric positive matrix from so many rows.

    Raises:
        StatisticsError: the matrix is singular to rounding.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
    if int(info) or bool(factor.diagonal().min() ** 2 <= rounding):
        raise StatisticsError(
            f"the covariance of {len(matrix)} features from {rows} rows is singular; shrink more, or collect more rows"
        )
    return torch.cholesky_solve(right.reshape(len(right), -1), factor).reshape(right.shape)
