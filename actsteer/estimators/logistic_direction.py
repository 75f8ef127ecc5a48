"""LogisticDirection: the weights of a logistic regression on which side a row is from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeAlias, final

import torch
from torch import Tensor

from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError
from actsteer.estimators.estimator import Reads, name_of, shown
from actsteer.estimators.newton import Recorded, newton, no_convergence
from actsteer.estimators.rows import Rows
from actsteer.vectors.vector import SteeringVector

RowsOrBlocks: TypeAlias = Recorded | Iterable[Recorded]
"""Recorded activations, site -> (n, d); or blocks of them, that can be gone over again and again."""


@final
class LogisticDirection:
    """v = argmin C Σ log(1 + exp(-y (x·v + b))) + ‖v‖² / 2 with y = +1 for positive rows and -1 for negative ones.

    The offset b is in the metadata, as "offset SITE". Recorded activations are given to scikit-learn (the extra
    `logistic`). A stream is gone over once per step of Newton's method, which keeps a gradient and a (d, d) matrix: the
    same optimum in memory that does not grow with the rows. With `fit`, `streamed=True` runs the model in every step.

    Args:
        C: the weight of the rows against that of ‖v‖² / 2, as scikit-learn's `C`.
        streamed: have `fit` stream the activations, not record them.
        steps: the largest number of Newton steps, or of scikit-learn's iterations.
        tolerance: it has converged when no entry of the gradient is larger, per row.

    Raises:
        StatisticsError: a side without rows, activations that are not finite, or no convergence.

    Source: probes, Alain & Bengio 2016; iteratively reweighted least squares, Green 1984.

    >>> rows = torch.tensor([[1.0], [2.0], [3.0]])
    >>> v = LogisticDirection()(positive=[{"2": rows}], negative=[{"2": -rows}])
    >>> bool(v["2"] > 0), abs(float(v.metadata["offset 2"])) < 1e-6
    (True, True)
    """

    reads: Reads = "rows"

    __repr__ = shown

    def __init__(self, *, C: float = 1.0, streamed: bool = False, steps: int = 100, tolerance: float = 1e-8) -> None:  # noqa: N803
        if not (math.isfinite(C) and C > 0):
            raise ValueError(f"C: expected a number above 0, got {C}")
        if steps < 1 or not tolerance > 0:
            raise ValueError(f"expected steps >= 1 and tolerance > 0, got steps={steps}, tolerance={tolerance}")
        self.C, self.streamed, self.steps, self.tolerance = C, streamed, steps, tolerance

    def __call__(self, *, positive: RowsOrBlocks, negative: RowsOrBlocks) -> SteeringVector:
        """The regression's weights at every site."""
        if self.streamed and isinstance(positive, Rows) and isinstance(negative, Rows):
            positive, negative = positive.blocks, negative.blocks
        if isinstance(positive, Mapping) and isinstance(negative, Mapping):
            _check_alike(positive, negative)
            found = {site: self._by_sklearn(site, positive[site], negative[site]) for site in positive}
        elif isinstance(positive, Mapping) or isinstance(negative, Mapping):
            raise TypeError("expected recorded activations on both sides, or a stream of them on both; got one of each")
        else:
            found = newton(positive, negative, C=self.C, steps=self.steps, tolerance=self.tolerance)
        described = {f"offset {site}": repr(float(weights[-1])) for site, weights in found.items()}
        kind = torch.get_default_dtype()
        return SteeringVector(
            {site: weights[:-1].to(kind) for site, weights in found.items()},
            metadata={"estimator": name_of(self)} | described,
        )

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
