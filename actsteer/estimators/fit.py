"""fit: from a model and two sets of data to a vector, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol, TypeVar, cast, final, runtime_checkable

from torch import Tensor, nn

from actsteer.collecting.batches import Batches, iterate
from actsteer.collecting.collect import collect
from actsteer.collecting.pairs import collect_differences
from actsteer.collecting.positions import Positions
from actsteer.collecting.record import record
from actsteer.errors import BatchError
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.steering.interventions.low_rank import LowRank
from actsteer.vectors.vector import SteeringVector

Result = TypeVar("Result", SteeringVector, LowRank, covariant=True)


@runtime_checkable
class Fits(Protocol[Result]):
    """An estimator of vectors, or of edits: from what was collected, or recorded, on two sides."""

    def __call__(self, *, positive: Any, negative: Any) -> Result:
        """The vector or the edit."""
        ...


def fit(
    model: nn.Module,
    *,
    positive: Batches,
    negative: Batches,
    sites: Sites,
    estimator: Fits[Result] | None = None,
    concept: str | None = None,
    positions: Positions = "all",
    axis: Axes | None = None,
    batch_size: int = 256,
    stop: bool = True,
    progress: bool = True,
) -> Result:
    """Collect statistics on both sides and estimate the vector that points from negative to positive.

    Args:
        positive, negative: data with and without the concept, as for `collect`.
        sites: names, globs or a predicate, as for `find_sites`.
        estimator: `MeanDifference()` unless another is given. For `PrincipalDirection(paired=True)` the rows of both
            sides pair up; for `LogisticDirection` the activations are recorded or, streamed, the model runs many times.
        concept: what the vector stands for.
        positions: which positions of a sequence count, as for `collect`.
        axis: the feature axis, as for `collect`; the vector remembers it.
        stop: whether passes end with the last site, as for `collect`.

    Returns:
        What the estimator gives: a SteeringVector or, from `ConceptErasure`, a LowRank edit.

    Raises:
        SiteNotFoundError, BatchError, StatisticsError: as `collect` and the estimator.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> fit(model, positive=torch.ones(4, 2), negative=torch.zeros(4, 2), sites="1", concept="one").concept
    'one'
    """
    chosen = cast("Fits[Result]", estimator or MeanDifference())
    options: dict[str, Any] = {"sites": sites, "positions": positions, "axis": axis}
    options |= {"batch_size": batch_size, "stop": stop}
    described: dict[str, str] = {}
    if getattr(chosen, "paired", False):
        toward: Any = collect_differences(model, positive, negative, progress=progress, **options)
        away: Any = -toward
    elif getattr(chosen, "needs_rows", False):
        # a count of one row for the metadata, and for errors before any work
        _check_repeats(negative)
        seen = partial(collect, model, progress=False, **options)
        described = seen(_first(positive, batch_size)).metadata
        if getattr(chosen, "streamed", False):
            toward, away = (_Replay(model, side, options) for side in (positive, negative))
        else:
            toward, away = (record(model, side, progress=progress, **options) for side in (positive, negative))
    else:
        options |= {"covariance": getattr(chosen, "needs_covariance", False), "progress": progress}
        toward, away = (collect(model, side, **options) for side in (positive, negative))
    found = chosen(positive=toward, negative=away)
    metadata = described | found.metadata | ({} if concept is None else {"concept": concept})
    if isinstance(found, LowRank):
        return found.described(metadata)
    return SteeringVector({site: found[site] for site in found}, metadata=metadata)


def _first(batches: Batches, batch_size: int) -> list[Any]:
    _check_repeats(batches)
    return [next(iterate(batches, batch_size=batch_size, progress=False, label=""))]


def _check_repeats(batches: Batches) -> None:
    if not isinstance(batches, Tensor) and iter(batches) is batches:
        raise BatchError("this estimator goes over the data more than once; give a list, not a generator")


@final
class _Replay:
    """The activations block by block, from the model, every time that they are gone over."""

    def __init__(self, model: nn.Module, batches: Batches, options: dict[str, Any]) -> None:
        self._model, self._batches, self._options = model, batches, options

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in iterate(self._batches, batch_size=self._options["batch_size"], progress=False, label=""):
            yield record(self._model, [batch], progress=False, **self._options)
