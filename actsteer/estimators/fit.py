"""fit: from a model and two sets of data to a vector, in one call."""

from __future__ import annotations

from torch import nn

from actsteer.collecting.batches import Batches
from actsteer.collecting.collect import collect
from actsteer.estimators.estimator import Estimator
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.vectors.vector import SteeringVector


def fit(
    model: nn.Module,
    *,
    positive: Batches,
    negative: Batches,
    sites: Sites,
    estimator: Estimator | None = None,
    concept: str | None = None,
    axis: Axes | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> SteeringVector:
    """Collect statistics on both sides and estimate the vector that points from negative to positive.

    Args:
        positive, negative: data with and without the concept, as for `collect`.
        sites: names, globs or a predicate, as for `find_sites`.
        estimator: `MeanDifference()` unless another is given.
        concept: what the vector stands for.
        axis: the feature axis, as for `collect`; the vector remembers it.

    Raises:
        SiteNotFoundError, BatchError, StatisticsError: as `collect` and the estimator.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> fit(model, positive=torch.ones(4, 2), negative=torch.zeros(4, 2), sites="1", concept="one").concept
    'one'
    """
    estimator = estimator or MeanDifference()
    toward, away = (
        collect(
            model,
            batches,
            sites=sites,
            axis=axis,
            covariance=estimator.needs_covariance,
            batch_size=batch_size,
            progress=progress,
        )
        for batches in (positive, negative)
    )
    vector = estimator(positive=toward, negative=away)
    named = {} if concept is None else {"concept": concept}
    return SteeringVector({site: vector[site] for site in vector}, metadata=vector.metadata | named)
