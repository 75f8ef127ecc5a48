"""Conceptor: an edit that keeps of the activation what one side has much of, and combines with and, or and not."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.estimators.estimator import Reads, check_alike, described, dtype_of, second_moment, shown
from actsteer.steering.interventions.soft_projection import SoftProjection


@final
class Conceptor:
    """h + c · (C h - h) with C = R (R + α⁻² 1)⁻¹ and R = E₊[h hᵀ], the second moment of the positive activations.

    A direction whose mean square is s is kept by the share s / (s + α⁻²): C is the map that loses least of the positive
    activations, E₊‖C h - h‖², at a cost of α⁻² ‖C‖². The negative side does not count; fit a conceptor of it and take
    `toward & ~away`. What `SoftProjection`, the edit, says of `&`, `|` and `~` holds for any of them.

    Args:
        aperture: α > 0, in the inverse unit of an activation: about 1 / ‖h‖ and more. The larger, the more is kept.

    Raises:
        StatisticsError: no covariance was collected.

    Source: Jaeger 2014 (arXiv 1403.3369); for steering, Postmus & Abreu 2024 (arXiv 2410.16314), whose factor beside C
    is left to c and to `KeepNorm`.

    >>> from torch import nn
    >>> from actsteer import fit
    >>> model, x = nn.Sequential(nn.Identity()), torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
    >>> edit = fit(model, positive=x, negative=x, sites="0", estimator=Conceptor(aperture=0.5))
    >>> edit["0"], (~edit)["0"]
    (tensor([[0.5000, 0.0000],
            [0.0000, 0.0000]]), tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]]))
    """

    reads: Reads = "covariance"

    __repr__ = shown

    def __init__(self, *, aperture: float) -> None:
        if not (math.isfinite(aperture) and aperture > 0):
            raise ValueError(f"aperture: expected a number > 0, got {aperture}")
        self.aperture = aperture

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SoftProjection:
        """The edit at every site."""
        check_alike(positive, negative)
        sites = {site: self._kept(positive[site]) for site in positive}
        return SoftProjection(sites, metadata=described(self, positive=positive, negative=negative))

    def _kept(self, positive: Moments) -> Float[Tensor, "d d"]:
        values, vectors = torch.linalg.eigh(second_moment(positive))
        values = values.clamp(min=0)
        kept: Tensor = (vectors * (values / (values + self.aperture**-2))) @ vectors.T
        return kept.to(dtype_of(positive))
