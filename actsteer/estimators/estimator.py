"""What an estimator is: what was seen on two sides in, a SteeringVector or an edit out, and nothing kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import TypeVar

from actsteer.collecting.moments import Covariance, Moments, wider
from actsteer.collecting.pairs import JOINT
from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError
from actsteer.steering.interventions.intervention import Edit
from actsteer.vectors.vector import SteeringVector

Reads: TypeAlias = Literal["means", "variances", "covariance", "pairs", "joint", "rows"]
"""What an estimator reads of the activations; see `Estimator`."""

COVARIANCE: Mapping[str, Covariance] = {"means": False, "variances": "diagonal", "covariance": True}
"""What an estimator reads of each side by itself -> `covariance=` of the `collect` that keeps it."""

Result = TypeVar("Result", bound=SteeringVector | Edit, default=SteeringVector)
Result_co = TypeVar("Result_co", bound=SteeringVector | Edit, default=SteeringVector, covariant=True)


@runtime_checkable
class Estimator(Protocol[Result_co]):
    """From what two sides were seen to do, a vector that points from negative to positive, or an edit.

    A class of your own that has these two members does all that ours do, in `fit`, in `fit_pairs` and as
    `actsteer fit --estimator package.module:Class`; `fit` writes its name, the counts, the feature axes and the model
    into the metadata. `reads` says what both sides are; for a type checker, write `reads: Literal["rows"] = "rows"`:

        "means"        Statistics: the count and the mean at each site
        "variances"    and the variance of each feature, in O(d) memory
        "covariance"   and the covariance, in O(d²) memory
        "pairs"        Statistics, with covariance, of the differences x₊ - x₋ of pairs of rows, and their negatives
        "joint"        Statistics, with covariance, of (x₊, x₋) side by side over pairs of rows, the same for both sides
        "rows"         `Rows`: site -> (n, d), the activations themselves, at once or block by block

    >>> from torch import nn
    >>> from actsteer import fit
    >>> class Signs:
    ...     reads = "means"
    ...
    ...     def __call__(self, *, positive, negative):
    ...         return SteeringVector({site: (positive[site].mean - negative[site].mean).sign() for site in positive})
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> fit(nn.Sequential(nn.Identity()), positive=x, negative=-x, sites="0", estimator=Signs())["0"]
    tensor([1., 1.], dtype=torch.float64)
    """

    @property
    def reads(self) -> Reads:
        """What it is to be given of each side."""
        ...

    def __call__(self, *, positive: Any, negative: Any) -> Result_co:
        """The vector or the edit; it points toward the positive side."""
        ...


def check_estimator(estimator: Any) -> None:
    """TypeError unless it is an estimator, ValueError unless it reads what can be given."""
    if isinstance(estimator, type):
        raise TypeError(f"estimator: expected an object, got the class {estimator.__name__}; call it first")
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator: expected an object with `reads`, one of {', '.join(map(repr, get_args(Reads)))}, that is "
            f"called with positive= and negative=; got {type(estimator).__name__}"
        )
    if estimator.reads not in get_args(Reads):
        raise ValueError(
            f"{type(estimator).__name__}.reads: expected one of {', '.join(map(repr, get_args(Reads)))}, "
            f"got {estimator.reads!r}"
        )


def check_found(found: Any, *, by: str) -> None:
    """TypeError unless it is what an estimator makes."""
    if not isinstance(found, SteeringVector | Edit):
        raise TypeError(f"{by}: expected a SteeringVector, or an edit such as LowRank, got {type(found).__name__}")


def name_of(estimator: Estimator[Any]) -> str:
    """The class's name, for the metadata; of a class that is not ours `module:Class`, as the command line takes it."""
    kind = type(estimator)
    return kind.__name__ if kind.__module__.startswith("actsteer.") else f"{kind.__module__}:{kind.__qualname__}"


def described(estimator: Estimator[Any], *, positive: Statistics, negative: Statistics) -> dict[str, str]:
    """Metadata: what the statistics of both sides say of themselves alike, the estimator, and the counts."""
    first = positive.sites[0]
    shared = positive.metadata.items() & negative.metadata.items()
    return dict(shared - JOINT.items()) | {
        "estimator": name_of(estimator),
        "positive count": str(positive[first].count),
        "negative count": str(negative[first].count),
    }


def with_metadata(found: Result, metadata: Mapping[str, str], *, concept: str | None) -> Result:
    """The same vector or edit under this name; of this metadata, but for other sites' axes, it gets what it lacks."""
    vector = found if isinstance(found, SteeringVector) else found.constant
    elsewhere = {key for key in metadata if key.startswith("axis ") and key.removeprefix("axis ") not in vector}
    whole = {key: text for key, text in metadata.items() if key not in elsewhere} | vector.metadata
    whole |= {} if concept is None else {"concept": concept}
    if isinstance(found, SteeringVector):
        return cast("Result", SteeringVector({site: found[site] for site in found}, metadata=whole))
    return cast("Result", found.described(whole))


def estimate(
    estimator: Estimator[Any],
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
    found = SteeringVector(directions, metadata=described(estimator, positive=positive, negative=negative))
    warn_of_zeros(found, stacklevel=4)
    return found


def warn_of_zeros(found: SteeringVector, *, stacklevel: int) -> None:
    """Warn where a direction is zero, with which nothing is steered."""
    if zeros := [site for site in found if not bool(found[site].any())]:
        where = "these sites" if len(zeros) == len(found) else f"{zeros[:8]}"
        warnings.warn(f"the vector is zero: both sides are alike at {where}", UserWarning, stacklevel=stacklevel)


def shown(self: object) -> str:
    """The repr of an estimator, as it was made: Class(argument=value)."""
    names = [name for name in signature(type(self)).parameters if hasattr(self, name)]
    return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def check_alike(positive: Statistics, negative: Statistics) -> None:
    """Raise unless both sides were collected at the same sites of the same sizes, and are finite."""
    for side, given in (("positive", positive), ("negative", negative)):
        if not isinstance(given, Statistics):
            raise TypeError(f"{side}: expected Statistics, as collect gives them, got {type(given).__name__}; see fit")
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
    """Raise StatisticsError for a side that has no rows, or whose rows are not all finite."""
    for side, moments in sides.items():
        if not moments.count:
            raise StatisticsError(f"site {site!r}: the {side} side has no rows")
        sums = [moments.mean, moments.scatter] if moments.has_covariance else [moments.mean]
        if not all(bool(total.isfinite().all()) for total in sums):
            raise StatisticsError(
                f"site {site!r}: the {side} statistics are not finite; look for inf or nan in the data"
            )


def solved(matrix: Float[Tensor, "d d"], right: Float[Tensor, "d ..."], *, rows: int) -> Float[Tensor, "d ..."]:
    """The solution x of matrix · x = right, for a symmetric positive definite matrix; the error names `rows`.

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


def ridged(
    matrix: Float[Tensor, "d d"], right: Float[Tensor, "d ..."], *, ridge: float, site: str, rows: int
) -> Float[Tensor, "d ..."]:
    """The solution x of (matrix + λ I) · x = right, where λ is `ridge` as a share of the mean of the diagonal.

    Raises:
        StatisticsError: that is singular to rounding.
    """
    if not bool(matrix.diagonal().any()):
        raise StatisticsError(f"site {site!r}: the {rows} rows are all the same; collect others")
    penalised = matrix + ridge * matrix.trace() / len(matrix) * torch.eye(len(matrix)).to(matrix)
    try:
        return solved(penalised, right, rows=rows)
    except StatisticsError as error:
        raise StatisticsError(f"site {site!r}: {error}; or give a larger ridge") from error


def dtype_of(*moments: Moments) -> torch.dtype:
    """That of an edit that is fitted on these: of their rows or, if that is narrower, torch's default one."""
    kind = torch.get_default_dtype()
    for own in moments:
        kind = wider(kind, own.dtype or torch.float64)
    return kind


def second_moment(moments: Moments) -> Float[Tensor, "d d"]:
    """E[h hᵀ]."""
    return moments.scatter / moments.count + torch.outer(moments.mean, moments.mean)
