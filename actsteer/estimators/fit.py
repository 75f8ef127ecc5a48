"""fit: from a model and two sets of data to a vector, in one call."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.collect import collect
from actsteer.collecting.pairs import collect_differences, collect_joint
from actsteer.collecting.statistics import Statistics
from actsteer.errors import BatchError
from actsteer.estimators.estimator import (
    COVARIANCE,
    Estimator,
    Result,
    check_estimator,
    described,
    name_of,
    warn_of_zeros,
    with_metadata,
)
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.estimators.rows import Rows
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.steering.interventions.intervention import Edit
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks
from actsteer.vectors.vector import SteeringVector


def fit(
    model: nn.Module,
    *,
    positive: Batches,
    negative: Batches,
    sites: Sites,
    estimator: Estimator[Result] | None = None,
    concept: str | None = None,
    positions: Positions = "all",
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    batch_size: int = 256,
    stop: bool = True,
    progress: bool = True,
) -> Result:
    """Collect what the estimator reads on both sides, and estimate the vector that points from negative to positive.

    Args:
        positive, negative: data with and without the concept, as for `collect`.
        sites: names, globs or a predicate, as for `find_sites`.
        estimator: `MeanDifference()` unless another is given, ours or yours; see `Estimator`. One that reads "pairs",
            as `PrincipalDirection(paired=True)`, or "joint", as `PairedMap`, needs as many rows on both sides; one that
            reads "rows", as `LogisticDirection`, records the activations or goes over the data several times.
        concept: what the vector stands for.
        positions: which positions of a sequence count, as for `collect`.
        axis: the feature axis, as for `collect`; the vector remembers it.
        stop: whether passes end with the last site, as for `collect`.

    Returns:
        What the estimator gives: a SteeringVector or an edit, as `ConceptErasure` gives a `LowRank`.

    Raises:
        SiteNotFoundError, BatchError, StatisticsError: as `collect` and the estimator.
        TypeError: what is no estimator, or gives neither a vector nor an edit.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    >>> fit(model, positive=torch.ones(4, 2), negative=torch.zeros(4, 2), sites="1", concept="one").concept
    'one'
    """
    chosen = cast("Estimator[Result]", MeanDifference() if estimator is None else estimator)
    check_estimator(chosen)
    options: dict[str, Any] = {"sites": sites, "positions": positions, "axis": axis, "batch_size": batch_size}
    options |= {"row_axis": row_axis, "token_axis": token_axis, "mask": mask, "stop": stop}
    if chosen.reads == "pairs":
        differences = collect_differences(model, positive, negative, progress=progress, **options)
        return estimated(chosen, positive=differences, negative=-differences, concept=concept)
    if chosen.reads == "joint":
        joint = collect_joint(model, positive, negative, progress=progress, **options)
        return estimated(chosen, positive=joint, negative=joint, concept=concept)
    if chosen.reads == "rows":
        # one batch, for the metadata, and for errors before any work
        _check_repeats(negative)
        seen = collect(model, _first(positive, batch_size), progress=False, **options)
        toward, away = (Rows(model, side, progress=progress, options=options) for side in (positive, negative))
        found = _checked(chosen, chosen(positive=toward, negative=away))
        return with_metadata(found, seen.metadata | {"estimator": name_of(chosen)}, concept=concept)
    options |= {"covariance": COVARIANCE[chosen.reads], "progress": progress}
    high, low = (collect(model, side, **options) for side in (positive, negative))
    return estimated(chosen, positive=high, negative=low, concept=concept)


def estimated(
    estimator: Estimator[Result], *, positive: Statistics, negative: Statistics, concept: str | None
) -> Result:
    """What the estimator makes of statistics, with the metadata that `fit` writes.

    Raises:
        TypeError: it makes neither a vector nor an edit.
    """
    found = _checked(estimator, estimator(positive=positive, negative=negative))
    return with_metadata(found, described(estimator, positive=positive, negative=negative), concept=concept)


def _checked(estimator: Estimator[Result], found: Any) -> Result:
    if not isinstance(found, SteeringVector | Edit):
        raise TypeError(
            f"{type(estimator).__name__}: expected a SteeringVector, or an edit such as LowRank, got "
            f"{type(found).__name__}"
        )
    if isinstance(found, SteeringVector) and ":" in name_of(estimator):  # ours have said it themselves
        warn_of_zeros(found, stacklevel=4)
    return cast("Result", found)


def _first(batches: Batches, batch_size: int) -> list[Any]:
    _check_repeats(batches)
    return [next(iterate(batches, batch_size=batch_size, progress=False, label=""))]


def _check_repeats(batches: Batches) -> None:
    if not isinstance(batches, Tensor) and iter(batches) is batches:
        raise BatchError("this estimator goes over the data more than once; give a list, not a generator")
