"""Gates: whether, or how much, each row of the batch is steered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.statistics import Statistics
from actsteer.errors import ShapeError, SiteNotFoundError, StatisticsError, close_names
from actsteer.vectors.vector import SteeringVector

Evidence: TypeAlias = Statistics | Mapping[str, Tensor] | Tensor
"""What a threshold is chosen from: statistics, recorded activations (site -> (n, d)), or projections (n,)."""


@runtime_checkable
class Gate(Protocol):
    """A decision per row, read at the gate's own site: the steered one, or one that runs before it."""

    @property
    def site(self) -> str:
        """The name of the module whose activation the gate reads."""
        ...

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """A bool, or a weight that multiplies c, per row: shape (rows,). A sequence is read as the mean over it."""
        ...


@final
class ProjectionAbove:
    """Fires for a row h where its scalar projection exceeds a threshold: h · v / ‖v‖ > t.

    Args:
        vector: the direction, at the one site where the gate reads.
        threshold: t, in the activation's own units; `ProjectionAbove.between` picks it.

    Raises:
        ShapeError: the vector has several sites; select one.
        ZeroDirectionError: the direction is zero.

    Source: conditional activation steering (CAST), Lee et al. 2024, with a projection in place of the cosine.

    >>> gate = ProjectionAbove(SteeringVector({"2": torch.tensor([0.0, 5.0])}), threshold=1.0)
    >>> gate.site, gate(torch.tensor([[9.0, 0.5], [0.0, 1.5]]))
    ('2', tensor([False,  True]))
    """

    __slots__ = ("_direction", "site", "threshold")

    def __init__(self, vector: SteeringVector, threshold: float) -> None:
        if len(vector) != 1:
            raise ShapeError(f"a gate reads one site, the vector has {vector.sites}; choose one with vector.select")
        self.site = vector.sites[0]
        self.threshold = float(threshold)
        with torch.inference_mode(mode=False):  # so that it works in autograd later
            self._direction = vector.unit()[self.site].clone()

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """A copy of the unit direction that the gate projects on."""
        return self._direction.clone()

    def projection(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The scalar projection of each row, h · v / ‖v‖, in the activation's own units."""
        if rows.shape[-1] != len(self._direction):
            raise ShapeError(
                f"gate at site {self.site!r}: the activation has {rows.shape[-1]} features, the gate's direction "
                f"{len(self._direction)}; was it fitted on another model?"
            )
        return rows @ self._direction.to(rows)

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's projection exceeds the threshold, shape (rows,), bool."""
        return self.projection(rows) > self.threshold

    @classmethod
    def between(cls, vector: SteeringVector, *, positive: Evidence, negative: Evidence) -> ProjectionAbove:
        """The gate whose threshold best separates the positive rows, which are to be steered, from the negative ones.

        From statistics: t = (μ₊σ₋ + μ₋σ₊) / (σ₊ + σ₋), where both classes err equally often if they are Gaussian; the
        midpoint of the means where either spread is unknown or zero. From activations or projections: the midpoint
        between the two neighbouring projections at which the balanced accuracy is largest.

        Raises:
            StatisticsError: the positive side does not project higher than the negative one, or a side is empty.
        """
        gate = cls(vector, 0.0)
        if isinstance(positive, Statistics) and isinstance(negative, Statistics):
            high, spread_high = gate._mean_and_spread(positive)
            low, spread_low = gate._mean_and_spread(negative)
            if high <= low:
                raise StatisticsError(
                    f"gate at site {gate.site!r}: the positive mean projects to {high:.4g}, the negative to {low:.4g}; "
                    "is the vector's sign reversed?"
                )
            if not (spread_high and spread_low):
                return cls(vector, (high + low) / 2)
            return cls(vector, (high * spread_low + low * spread_high) / (spread_high + spread_low))
        return cls(vector, _best_split(gate._projections(positive), gate._projections(negative)))

    def _mean_and_spread(self, statistics: Statistics) -> tuple[float, float]:
        moments = statistics[self.site]
        direction = self._direction.to(moments.mean)
        try:
            spread = float((direction @ moments.covariance @ direction).clamp(min=0).sqrt())
        except StatisticsError:
            spread = 0.0
        return float(moments.mean @ direction), spread

    def _projections(self, evidence: Evidence) -> Tensor:
        if isinstance(evidence, Statistics):
            raise StatisticsError("expected both sides as statistics, or neither; got one of each")
        if isinstance(evidence, Mapping):
            if self.site not in evidence:
                raise SiteNotFoundError(f"nothing recorded at site {self.site!r}. {close_names(self.site, evidence)}")
            evidence = self.projection(evidence[self.site])
        if evidence.ndim != 1 or len(evidence) == 0:
            raise StatisticsError(f"expected projections of shape (n,) with n >= 1, got shape {tuple(evidence.shape)}")
        return evidence.detach().double()

    def __repr__(self) -> str:
        return f"ProjectionAbove(site={self.site!r}, threshold={self.threshold:.4g})"


def _best_split(positive: Tensor, negative: Tensor) -> float:
    """The threshold of largest balanced accuracy, halfway between two neighbouring values."""
    values = torch.unique(torch.cat([positive, negative]))
    above = 1 - torch.searchsorted(positive.sort().values, values, right=True) / len(positive)
    below = torch.searchsorted(negative.sort().values, values, right=True) / len(negative)
    best = int((above + below).argmax())
    if float(above[best] + below[best]) <= 1.0:
        raise StatisticsError("no threshold separates the positive side from the negative; is the sign reversed?")
    return float(values[best] + values[min(best + 1, len(values) - 1)]) / 2
