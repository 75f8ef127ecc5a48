"""fit: from a model and two sets of data to a vector, in one call."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

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
    check_found,
    described,
    name_of,
    warn_of_zeros,
    with_metadata,
)
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.estimators.one_by_one import one_by_one as fit_one_by_one
from actsteer.estimators.rows import Rows
from actsteer.sites.axes import Axes, said_at
from actsteer.sites.resolve import Sites
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks
from actsteer.vectors.vector import SteeringVector

OneByOne: TypeAlias = bool | Literal["negative"]
"""Whether a site is fitted as if alone, False; or while the model is steered by what was fitted at the sites that run
before it, True; or "negative": the negative side alone is steered, and the positive one as it is."""


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
    one_by_one: OneByOne = False,
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
        one_by_one: True fits each site, in a pass over the data of its own, while `Steerer(model, found)` applies what
            was found at the sites that run before it: so `ConceptErasure` scrubs a concept from a whole model.
            "negative" steers the negative side alone in these passes, for vectors and for maps such as
            `GaussianMap`: so steered, it has at every site what is matched of the positive side, which stays as it
            is. See `one_by_one`.
        stop: whether passes end with the last site, as for `collect`.

    Returns:
        What the estimator gives: a SteeringVector or an edit, as `ConceptErasure` gives a `LowRank`.

    Raises:
        SiteNotFoundError, BatchError, StatisticsError: as `collect` and the estimator.
        TypeError: what is no estimator, or gives neither a vector nor an edit.
        ValueError: one_by_one="negative" for an estimator that does not read statistics of each side.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    >>> fit(model, positive=torch.ones(4, 2), negative=torch.zeros(4, 2), sites="1", concept="one").concept
    'one'
    """
    chosen = cast("Estimator[Result]", MeanDifference() if estimator is None else estimator)
    check_estimator(chosen)
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    options: dict[str, Any] = {"positions": positions, "batch_size": batch_size, "stop": stop}
    if one_by_one:
        _check_one_by_one(one_by_one, chosen)
        first, options = _first(negative, batch_size)[0], options | {"progress": progress}
        if one_by_one == "negative":
            goal = collect(model, positive, sites=sites, covariance=COVARIANCE[chosen.reads], **where, **options)
        else:
            _check_repeats(positive)

        def fitted(site: str) -> Result:
            here = options | {name: said_at(said, (site,)) for name, said in where.items()} | {"sites": site}
            if one_by_one != "negative":
                return fit(model, positive=positive, negative=negative, estimator=chosen, concept=concept, **here)
            toward = Statistics({site: goal[site]}, metadata=goal.metadata)
            away = collect(model, negative, covariance=COVARIANCE[chosen.reads], **here)
            return estimated(chosen, positive=toward, negative=away, concept=concept)

        return fit_one_by_one(model, first, sites=sites, fitted=fitted, **where)
    options |= where | {"sites": sites}
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
    check_found(found, by=type(estimator).__name__)
    if isinstance(found, SteeringVector) and ":" in name_of(estimator):  # ours have said it themselves
        warn_of_zeros(found, stacklevel=4)
    return cast("Result", found)


def _check_one_by_one(given: OneByOne, estimator: Estimator[Any]) -> None:
    if given not in (True, "negative"):
        raise ValueError(f"one_by_one: expected False, True or 'negative', got {given!r}")
    if given == "negative" and estimator.reads not in COVARIANCE:
        raise ValueError(
            f"one_by_one: {type(estimator).__name__} reads {estimator.reads}, and not statistics of each side, of "
            "which the negative one alone can be steered; take one_by_one=True"
        )


def _first(batches: Batches, batch_size: int) -> list[Any]:
    _check_repeats(batches)
    return [next(iterate(batches, batch_size=batch_size, progress=False, label=""))]


def _check_repeats(batches: Batches) -> None:
    if not isinstance(batches, Tensor) and iter(batches) is batches:
        raise BatchError("this estimator goes over the data more than once; give a list, not a generator")
