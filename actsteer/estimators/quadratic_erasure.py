"""QuadraticErasure: an edit for every class, after which no quadratic probe can tell the classes apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.classes import ClassStatistics, Label
from actsteer.collecting.moments import Moments
from actsteer.errors import StatisticsError
from actsteer.estimators.estimator import check_alike, dtype_of, shown
from actsteer.estimators.gaussian_map import transport
from actsteer.steering.interventions.affine import Affine


@final
class QuadraticErasure:
    """Label -> μ + A_k (h - μ_k), the smallest edits that give all classes the same mean μ and the same covariance Σ.

        μ = Σ_k w_k μ_k,   Σ = Σ_k w_k (Σ^½ Σ_k Σ^½)^½        with w_k the share of the rows of class k
        A_k = Σ_k^-½ (Σ_k^½ Σ Σ_k^½)^½ Σ_k^-½                 as in `GaussianMap`

    Σ is the barycenter of the classes' covariances, found by iteration. A row's label decides which edit it gets, so
    that the labels must be known, as where a probe is trained on what is left. Steer with each edit at a strength by
    row: 1 for the rows of its class, 0 for the others. `ConceptErasure` steers without labels, and hides the classes
    from linear probes alone.

    Args:
        tolerance: the iteration ends where Σ changes by less than this share of its norm.
        steps: or after so many.

    Raises:
        StatisticsError: one class alone; a class that does not vary in all directions, as of fewer rows than features;
            no covariance; or an iteration that did not end.

    Source: QLEACE, Belrose et al. 2023 (arXiv 2306.03819); the iteration, Álvarez-Esteban et al. 2016.

    >>> from contextlib import ExitStack
    >>> from torch import nn
    >>> from actsteer import Steerer, collect
    >>> model, labels = nn.Sequential(nn.Identity()), torch.tensor([0, 0, 1, 1])
    >>> rows = torch.tensor([[-1.0], [1.0], [7.0], [13.0]])
    >>> edits = QuadraticErasure()(collect(model, rows, by=labels, sites="0", covariance=True))
    >>> with ExitStack() as all_of_them:
    ...     for label, edit in edits.items():
    ...         steerer = all_of_them.enter_context(Steerer(model, edit, c=(labels == label).float()))
    ...     model(rows).round(decimals=3).flatten()
    tensor([3., 7., 3., 7.])
    """

    __repr__ = shown

    def __init__(self, *, tolerance: float = 1e-12, steps: int = 1000) -> None:
        if not (tolerance > 0 and steps >= 1):
            raise ValueError(f"expected tolerance > 0 and steps >= 1, got {tolerance=}, {steps=}")
        self.tolerance, self.steps = tolerance, steps

    def __call__(self, classes: ClassStatistics) -> dict[Label, Affine]:
        """The edit of every class."""
        if len(classes) < 2:
            raise StatisticsError(f"expected two classes or more, got {list(classes)}; there is nothing to tell apart")
        first, *others = classes.values()
        for other in others:
            check_alike(first, other)
        maps = {site: self._maps(site, {label: own[site] for label, own in classes.items()}) for site in first}
        told = {label: own.metadata | {"estimator": type(self).__name__} for label, own in classes.items()}
        return {
            label: Affine({site: own[label] for site, own in maps.items()}, concept=str(label), metadata=told[label])
            for label in classes
        }

    def _maps(self, site: str, parts: Mapping[Label, Moments]) -> dict[Label, tuple[Tensor, Tensor]]:
        """Label -> (A, b) of that class at one site."""
        rows = sum(own.count for own in parts.values())
        shares = {label: own.count / rows for label, own in parts.items()}
        covariances = {label: own.covariance for label, own in parts.items()}
        for label, own in covariances.items():
            values = torch.linalg.eigvalsh(own)
            if not bool(values[0] > len(own) * torch.finfo(own.dtype).eps * values[-1]):
                raise StatisticsError(
                    f"site {site!r}: the {parts[label].count} rows of class {label!r} do not vary in all "
                    f"{len(own)} directions, so that they cannot get the covariance of others; collect more"
                )
        middle = torch.stack([shares[label] * own.mean for label, own in parts.items()]).sum(dim=0)
        goal = self._barycenter(site, covariances, shares)
        kind = dtype_of(*parts.values())
        weights = {label: transport(own, goal) for label, own in covariances.items()}
        return {
            label: (weight.to(kind), (middle - weight @ parts[label].mean).to(kind))
            for label, weight in weights.items()
        }

    def _barycenter(
        self, site: str, covariances: Mapping[Label, Float[Tensor, "d d"]], shares: Mapping[Label, float]
    ) -> Float[Tensor, "d d"]:
        """The covariance from which the mean of the maps to all classes is the identity."""
        goal = torch.stack([shares[label] * own for label, own in covariances.items()]).sum(dim=0)
        for _ in range(self.steps):
            towards = [shares[label] * transport(goal, own) for label, own in covariances.items()]
            mean = torch.stack(towards).sum(dim=0)
            moved = mean @ goal @ mean
            moved = (moved + moved.T) / 2
            is_there = bool((moved - goal).norm() <= self.tolerance * goal.norm())
            goal = moved
            if is_there:
                return goal
        raise StatisticsError(
            f"site {site!r}: the covariance that all classes are to have did not settle in {self.steps} steps; give "
            "more, or a larger tolerance"
        )
