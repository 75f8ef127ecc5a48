"""SparseFeature: a feature of a sparse autoencoder as a direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.moments import Moments
from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, StatisticsError
from actsteer.estimators.estimator import Reads, estimate, shown
from actsteer.vectors.vector import SteeringVector


@final
class SparseFeature:
    """v = ± a row of the decoder of a sparse autoencoder, W_dec[i], with the sign of the side that is positive.

    Without a number, the feature whose row has the largest absolute cosine with μ₊ - μ₋. Source: Bricken et al. 2023.

    Args:
        autoencoder: the decoder's weight (features, d); or a module or mapping that holds it as `W_dec` (features, d),
            or as `decoder.weight` (d, features), as an `nn.Linear` has it.
        feature: i.

    Raises:
        ShapeError: no decoder there; no such feature, or one of zeros; another number of features than the activation.
        StatisticsError: the means of both sides are equal.

    >>> decoder = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> SparseFeature(decoder, feature=2).vector("2")["2"]
    tensor([0.6000, 0.8000])
    """

    reads: Reads = "means"

    __repr__ = shown

    def __init__(self, autoencoder: Tensor | nn.Module | Mapping[str, Any], *, feature: int | None = None) -> None:
        self._decoder = _decoder(autoencoder)
        if feature is not None and not 0 <= feature < len(self._decoder):
            raise ShapeError(f"feature: expected one of 0 to {len(self._decoder) - 1}, got {feature}")
        if not bool((self._decoder if feature is None else self._decoder[feature]).any()):
            raise ShapeError(f"feature: there is none, or only zeros, in a decoder of {len(self._decoder)} features")
        self.feature = feature

    def vector(self, site: str) -> SteeringVector:
        """The feature's direction at a site, without statistics and with the sign that it has."""
        if self.feature is None:
            raise ValueError("feature: name one, or let the statistics of two sides choose it")
        described = {"estimator": type(self).__name__, "feature": str(self.feature)}
        return SteeringVector({site: self._decoder[self.feature]}, metadata=described)

    def __call__(self, *, positive: Statistics, negative: Statistics) -> SteeringVector:
        """The feature's direction at every site, toward the positive side."""
        chosen: dict[str, str] = {}
        sites = iter(positive)

        def direction(toward: Moments, away: Moments) -> Tensor:
            row, index = self._chosen(toward.mean - away.mean)
            chosen[f"feature {next(sites)}"] = str(index)
            return row

        vector = estimate(self, direction, positive=positive, negative=negative)
        return SteeringVector({site: vector[site] for site in vector}, metadata=vector.metadata | chosen)

    def _chosen(self, difference: Float[Tensor, " d"]) -> tuple[Float[Tensor, " d"], int]:
        rows = self._decoder.to(difference)
        if rows.shape[1] != len(difference):
            raise ShapeError(f"the decoder's rows have {rows.shape[1]} features, the activation {len(difference)}")
        if not bool(difference.any()):
            raise StatisticsError("both sides have the same mean, which no feature tells apart; collect other rows")
        cosines = torch.nn.functional.normalize(rows, dim=1) @ difference
        index = int(cosines.abs().argmax()) if self.feature is None else self.feature
        return (-rows[index] if float(cosines[index]) < 0 else rows[index]), index


def _decoder(autoencoder: Any) -> Float[Tensor, "features d"]:
    held = autoencoder.state_dict() if isinstance(autoencoder, nn.Module) else autoencoder
    if isinstance(held, Mapping):
        weight = held.get("W_dec")
        if weight is None and isinstance(turned := held.get("decoder.weight"), Tensor):
            weight = turned.T
    else:
        weight = held
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ShapeError(
            f"expected a decoder's weight of shape (features, d), as a tensor, W_dec or decoder.weight; got "
            f"{type(autoencoder).__name__}"
        )
    return weight.detach().clone()
