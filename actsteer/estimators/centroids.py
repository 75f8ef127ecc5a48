"""Centroids: a vector for every class, from the mean of all other classes to the mean of that class."""

from __future__ import annotations

from typing import final

from actsteer.collecting.classes import ClassStatistics
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import shown
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector


@final
class Centroids:
    """v_k = μ_k - μ_rest for every class k, one against the rest: μ_rest is the mean of all rows of the other classes.

    One pass with labels gives a whole bank: `Centroids()(collect(model, x, by=y, sites=...))`, a concept per label.
    Source: nearest shrunken centroids, Tibshirani et al. 2002, without the shrinking.

    Raises:
        StatisticsError: there is one class alone, or two labels that read alike, such as 1 and "1".

    >>> import torch
    >>> from actsteer.collecting.moments import Moments
    >>> from actsteer.collecting.statistics import Statistics
    >>> rows = enumerate(torch.tensor([[0.0], [2.0], [5.0]]))
    >>> stats = ClassStatistics({digit: Statistics({"2": Moments.of(row[None])}) for digit, row in rows})
    >>> bank = Centroids()(stats)
    >>> bank.concepts, bank["2"]["2"]
    (('0', '1', '2'), tensor([4.]))
    """

    __repr__ = shown

    def __call__(self, classes: ClassStatistics) -> VectorBank:
        """The bank of all classes, in the order of the labels."""
        if len(classes) < 2:
            raise StatisticsError(f"expected two classes or more, got {list(classes)}; there is no rest")
        if len({str(label) for label in classes}) < len(classes):
            raise StatisticsError(f"two labels read alike: {list(classes)}; concepts are named by their text")
        vectors: dict[str, SteeringVector] = {}
        for label, statistics in classes.items():
            vector = MeanDifference()(positive=statistics, negative=classes.rest(label))
            described = vector.metadata | {"estimator": type(self).__name__, "concept": str(label)}
            vectors[str(label)] = SteeringVector({site: vector[site] for site in vector}, metadata=described)
        return VectorBank(vectors)
