"""ProjectionAbove: a gate on how far an activation lies along a direction."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, StatisticsError
from actsteer.steering.gates.gate import Per, check_per
from actsteer.steering.gates.threshold import Evidence, best_split
from actsteer.vectors.vector import SteeringVector


@final
class ProjectionAbove:
    """Fires for a row h where its scalar projection exceeds a threshold: h · v / ‖v‖ > t.

    Args:
        vector: the direction, at the one site where the gate reads.
        threshold: t, in the activation's units; `ProjectionAbove.between` picks it.
        per: decide once per "sequence", from the mean over its prompt, or for each "token".

    Raises:
        ShapeError: the vector has several sites; select one.
        ZeroDirectionError: the direction is zero.

    Source: conditional activation steering (CAST), Lee et al. 2024, with a projection in place of the cosine.

    >>> gate = ProjectionAbove(SteeringVector({"2": torch.tensor([0.0, 5.0])}), threshold=1.0)
    >>> gate.site, gate(torch.tensor([[9.0, 0.5], [0.0, 1.5]]))
    ('2', tensor([False,  True]))
    """

    __slots__ = ("_direction", "per", "site", "threshold")

    def __init__(self, vector: SteeringVector, threshold: float, *, per: Per = "sequence") -> None:
        check_per(per)
        self.site, self._direction = only_site(vector.unit())
        self.threshold = float(threshold)
        self.per: Per = per

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """A copy of the unit direction that the gate projects on."""
        return self._direction.clone()

    def projection(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The scalar projection of each row, h · v / ‖v‖, in the activation's units."""
        return rows @ fitting(self._direction, rows, self.site)

    score = projection

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's projection exceeds the threshold, shape (rows,), bool."""
        return self.projection(rows) > self.threshold

    @classmethod
    def between(
        cls, vector: SteeringVector, *, positive: Evidence, negative: Evidence, per: Per = "sequence"
    ) -> ProjectionAbove:
        """The gate whose threshold best separates the positive rows, which are to be steered, from the negative ones.

        From statistics: t = (μ₊σ₋ + μ₋σ₊) / (σ₊ + σ₋), where both classes err equally often if they are Gaussian; the
        midpoint of the means where either spread is unknown or zero. From activations or projections: the midpoint
        between the two neighbouring projections at which the balanced accuracy is largest.

        Raises:
            StatisticsError: the positive side does not project higher than the negative one, or a side is empty.
        """
        gate = cls(vector, 0.0, per=per)
        if not (isinstance(positive, Statistics) and isinstance(negative, Statistics)):
            return cls(vector, best_split(gate, positive=positive, negative=negative), per=per)
        high, spread_high = gate._mean_and_spread(positive)
        low, spread_low = gate._mean_and_spread(negative)
        if high <= low:
            raise StatisticsError(
                f"gate at site {gate.site!r}: the positive mean projects to {high:.4g}, the negative to {low:.4g}; "
                "is the vector's sign reversed?"
            )
        if not (spread_high and spread_low):
            return cls(vector, (high + low) / 2, per=per)
        return cls(vector, (high * spread_low + low * spread_high) / (spread_high + spread_low), per=per)

    def _mean_and_spread(self, statistics: Statistics) -> tuple[float, float]:
        moments = statistics[self.site]
        direction = self._direction.to(moments.mean)
        try:
            spread = float((direction @ moments.covariance @ direction).clamp(min=0).sqrt())
        except StatisticsError:
            spread = 0.0
        return float(moments.mean @ direction), spread

    def __repr__(self) -> str:
        tokens = ", per='token'" if self.per == "token" else ""
        return f"ProjectionAbove(site={self.site!r}, threshold={self.threshold:.4g}{tokens})"


def only_site(vector: SteeringVector) -> tuple[str, Float[Tensor, " d"]]:
    """The one site of a gate's vector, and the direction there.

    Raises:
        ShapeError: it has several sites, or none.
    """
    if len(vector) != 1:
        raise ShapeError(f"a gate reads one site, the vector has {vector.sites}; choose one with vector.select")
    site = vector.sites[0]
    with torch.inference_mode(mode=False):  # so that it works in autograd later
        return site, vector[site].clone()


def fitting(direction: Float[Tensor, " d"], rows: Float[Tensor, "rows d"], site: str) -> Float[Tensor, " d"]:
    """The direction in the rows' dtype and device.

    Raises:
        ShapeError: the rows have another size.
    """
    if rows.shape[-1] != len(direction):
        raise ShapeError(
            f"gate at site {site!r}: the activation has {rows.shape[-1]} features, the gate's direction "
            f"{len(direction)}; was it fitted on another model?"
        )
    return direction.to(rows)
