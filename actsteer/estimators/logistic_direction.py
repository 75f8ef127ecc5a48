"""LogisticDirection: the weights of a logistic regression on which side a row is from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor

from actsteer.collecting.moments import exact
from actsteer.errors import BatchError, ShapeError, SiteNotFoundError, StatisticsError
from actsteer.estimators.estimator import Reads, name_of, shown, warn_of_zeros
from actsteer.estimators.newton import Recorded, blocks, newton, no_convergence
from actsteer.estimators.rows import Rows
from actsteer.vectors.described import with_offsets
from actsteer.vectors.vector import SteeringVector

RowsOrBlocks: TypeAlias = Recorded | Iterable[Recorded]
"""Recorded activations, site -> (n, d); or blocks of them, that can be gone over again and again."""


@final
class LogisticDirection:
    """v = argmin C Σ log(1 + exp(-y (x·v + b))) + ‖v‖² / 2 with y = +1 for positive rows and -1 for negative ones.

    The offset b is in the metadata, as "offset SITE". Recorded activations are given to scikit-learn (the extra
    `logistic`). A stream is gone over once per step of Newton's method, which keeps a gradient and a (d, d) matrix: the
    same optimum in memory that does not grow with the rows. With `fit`, `streamed=True` runs the model in every step.

    With `paired`, v = argmin C Σ log(1 + exp(-(x₊ - x₋)·v)) + ‖v‖² / 2 over pairs of rows, without an offset: the
    likelihood that the positive one of each pair is the one it is, to which what both share does not count.

    Args:
        paired: the first positive row goes with the first negative one, and so on; `fit` sees to it that they are of
            the same row of the batch.
        C: the weight of the rows against that of ‖v‖² / 2, as scikit-learn's `C`.
        streamed: have `fit` stream the activations, not record them.
        steps: the largest number of Newton steps, or of scikit-learn's iterations.
        tolerance: it has converged when no entry of the gradient is larger, per row.

    Raises:
        StatisticsError: a side without rows, activations that are not finite, or no convergence.
        BatchError: `paired`, and the sides do not pair up.

    Warns:
        UserWarning: the vector is zero at a site.

    Source: probes, Alain & Bengio 2016; iteratively reweighted least squares, Green 1984; of pairs, the conditional
    likelihood, Breslow & Day 1980.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> v = LogisticDirection()(positive=[{"2": rows}], negative=[{"2": -rows}])
    >>> bool(v["2"] > 0), abs(float(v.metadata["offset 2"])) < 1e-6
    (True, True)
    >>> shared = torch.tensor([[100.0], [-7.0], [30.0]])
    >>> LogisticDirection(paired=True)(positive={"2": shared + rows}, negative={"2": shared - rows})["2"] > 0
    tensor([True])
    """

    reads: Reads = "rows"

    __repr__ = shown

    def __init__(
        self,
        *,
        C: float = 1.0,  # noqa: N803
        paired: bool = False,
        streamed: bool = False,
        steps: int = 100,
        tolerance: float = 1e-8,
    ) -> None:
        if not (math.isfinite(C) and C > 0):
            raise ValueError(f"C: expected a number above 0, got {C}")
        if steps < 1 or not tolerance > 0:
            raise ValueError(f"expected steps >= 1 and tolerance > 0, got steps={steps}, tolerance={tolerance}")
        self.C, self.paired, self.streamed, self.steps, self.tolerance = C, paired, streamed, steps, tolerance

    def __call__(self, *, positive: RowsOrBlocks, negative: RowsOrBlocks) -> SteeringVector:
        """The regression's weights at every site."""
        if isinstance(positive, Mapping) != isinstance(negative, Mapping):
            raise TypeError("expected recorded activations on both sides, or a stream of them on both; got one of each")
        if self.paired:
            return self._vector(self._newton(self._differences(positive, negative), None), {})
        if self.streamed and isinstance(positive, Rows) and isinstance(negative, Rows):
            positive, negative = positive.blocks, negative.blocks
        if isinstance(positive, Mapping) and isinstance(negative, Mapping):
            _check_alike(positive, negative)
            found = {site: self._by_sklearn(site, positive[site], negative[site]) for site in positive}
        else:
            found = self._newton(positive, negative)
        offsets = {site: float(weights[-1]) for site, weights in found.items()}
        return self._vector({site: weights[:-1] for site, weights in found.items()}, offsets)

    def _newton(self, positive: Iterable[Any], negative: Iterable[Any] | None) -> dict[str, Tensor]:
        return newton(positive, negative, C=self.C, steps=self.steps, tolerance=self.tolerance)

    def _differences(self, positive: RowsOrBlocks, negative: RowsOrBlocks) -> Iterable[Recorded]:
        if isinstance(positive, Rows) and isinstance(negative, Rows):
            blocks = positive.less(negative)
            return blocks if self.streamed else list(blocks)
        if isinstance(positive, Mapping) and isinstance(negative, Mapping):
            _check_alike(positive, negative)
            toward, away = cast("Recorded", positive), cast("Recorded", negative)
            return _Differences([toward], [{site: away[site] for site in toward}])
        return _Differences(positive, negative)

    def _vector(self, weights: Mapping[str, Tensor], offsets: Mapping[str, float]) -> SteeringVector:
        kind = torch.get_default_dtype()
        directions = {site: own.to(kind) for site, own in weights.items()}
        found = SteeringVector(directions, metadata=with_offsets({"estimator": name_of(self)}, offsets))
        warn_of_zeros(found, stacklevel=4)
        return found

    def _by_sklearn(self, site: str, positive: Tensor, negative: Tensor) -> Tensor:
        try:
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ImportError(
                'LogisticDirection on recorded activations needs scikit-learn: pip install "actsteer[logistic]", or '
                "streamed=True"
            ) from error
        rows = torch.cat([positive, negative]).double().cpu()
        if not (len(positive) and len(negative) and bool(rows.isfinite().all())):
            raise StatisticsError(f"site {site!r}: expected finite rows on both sides")
        from sklearn.exceptions import ConvergenceWarning

        labels = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))])
        regression = LogisticRegression(C=self.C, solver="newton-cholesky", tol=self.tolerance, max_iter=self.steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a matrix that is nearly singular: it goes on another way
            warnings.simplefilter("error", ConvergenceWarning)
            try:
                regression.fit(rows.numpy(), labels.numpy())
            except ConvergenceWarning as warning:
                raise StatisticsError(no_convergence((site,), self.steps)) from warning
        return torch.cat([torch.from_numpy(regression.coef_[0]), torch.from_numpy(regression.intercept_)])


@final
class _Differences:
    """The rows of one stream less those of another, that pair up."""

    def __init__(self, positive: Iterable[Any], negative: Iterable[Any]) -> None:
        self._sides = positive, negative

    def __iter__(self) -> Iterator[Recorded]:
        for toward, away in zip_longest(*map(blocks, self._sides)):
            if toward is None or away is None or toward[0] != away[0] or toward[1].shape != away[1].shape:
                told = [None if own is None else (own[0], tuple(own[1].shape)) for own in (toward, away)]
                raise BatchError(f"the sides do not pair up: expected blocks of one site and shape, got {told}")
            yield {toward[0]: exact(toward[1]) - exact(away[1])}


def _check_alike(positive: Recorded, negative: Recorded) -> None:
    if not positive:
        raise SiteNotFoundError("nothing was recorded: there are no sites")
    if set(positive) != set(negative):
        raise SiteNotFoundError(f"positive has the sites {list(positive)}, negative {list(negative)}")
    for site in positive:
        if positive[site].shape[1:] != negative[site].shape[1:] or positive[site].ndim != 2:
            raise ShapeError(
                f"site {site!r}: expected (n, d) on both sides, got {tuple(positive[site].shape)} and "
                f"{tuple(negative[site].shape)}"
            )
