"""ProjectionAbove: a gate on how far an activation lies along a direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, final

from jaxtyping import Float
from torch import Tensor

from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError
from actsteer.steering.alone import load_gate, save_gate
from actsteer.steering.gates.gate import Per, wide
from actsteer.steering.gates.gate_direction import GateDirection, shown
from actsteer.steering.gates.threshold import Evidence, best_split
from actsteer.steering.numbers import bound
from actsteer.vectors.vector import SteeringVector


@final
class ProjectionAbove:
    """Fires for a row h where its scalar projection exceeds a threshold: h · v / ‖v‖ > t.

    Args:
        vector: the direction, at the one site where the gate reads.
        threshold: t, in the activation's units; `ProjectionAbove.between` picks it.
        per: decide once per "sequence", from the mean over its prompt, or on the prompt's "last" token, or for each
            "token"; None takes what the vector's metadata says that it was fitted at: "last", or else "sequence".
            A UserWarning says where the two do not agree.

    Raises:
        ShapeError: the vector has several sites; select one.
        ZeroDirectionError: the direction is zero.

    Source: conditional activation steering (CAST), Lee et al. 2024, with a projection in place of the cosine.

    >>> import torch
    >>> gate = ProjectionAbove(SteeringVector({"2": torch.tensor([0.0, 5.0])}), threshold=1.0)
    >>> gate.site, gate(torch.tensor([[9.0, 0.5], [0.0, 1.5]]))
    ('2', tensor([False,  True]))
    """

    __slots__ = ("_direction", "per", "threshold")

    def __init__(self, vector: SteeringVector, threshold: float, *, per: Per | None = None) -> None:
        self._direction = GateDirection(vector, unit=True)
        self.threshold = bound(threshold, "threshold")
        self.per: Per = self._direction.per(per)

    @property
    def site(self) -> str:
        """Where the gate reads."""
        return self._direction.site

    @property
    def metadata(self) -> dict[str, str]:
        """That of the vector: on which model it was fitted, and at which positions."""
        return dict(self._direction.metadata)

    @property
    def direction(self) -> Float[Tensor, " d"]:
        """A copy of the unit direction that the gate projects on."""
        return self._direction.exact.clone()

    def projection(self, rows: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """The scalar projection of each row, h · v / ‖v‖, in the activation's units, in float32 at least."""
        rows = wide(rows)
        return rows @ self._direction.like(rows)

    score = projection

    def __call__(self, rows: Float[Tensor, "rows d"]) -> Tensor:
        """Whether each row's projection exceeds the threshold, shape (rows,), bool."""
        return self.projection(rows) > self.threshold

    def prepare(self, like: Float[Tensor, "rows d"]) -> Callable[[Float[Tensor, "rows d"]], Tensor]:
        """The decision on rows like these, in float32 or float64."""
        direction, threshold = self._direction.like(like), self.threshold
        limit = like.new_tensor(threshold)  # comparing with a number costs more than with a tensor

        def above(rows: Tensor) -> Tensor:
            projection = rows @ direction
            return projection > (limit if self.threshold == threshold else self.threshold)

        return above

    @classmethod
    def between(
        cls, vector: SteeringVector, *, positive: Evidence, negative: Evidence, per: Per | None = None
    ) -> ProjectionAbove:
        """The gate whose threshold best separates the positive rows, which are to be steered, from the negative ones.

        From statistics: t = (μ₊σ₋ + μ₋σ₊) / (σ₊ + σ₋), where both classes err equally often if they are Gaussian; the
        midpoint of the means where either spread is unknown or zero. From activations or projections: the midpoint
        between the two neighbouring projections at which the balanced accuracy is largest.

        Raises:
            StatisticsError: the positive side does not project higher than the negative one, or a side is empty.
        """
        gate = cls(vector, 0.0, per=per)
        gate.threshold = gate._between(positive, negative)
        return gate

    def _between(self, positive: Evidence, negative: Evidence) -> float:
        if not (isinstance(positive, Statistics) and isinstance(negative, Statistics)):
            return best_split(self, positive=positive, negative=negative)
        high, spread_high = self._mean_and_spread(positive)
        low, spread_low = self._mean_and_spread(negative)
        if high <= low:
            raise StatisticsError(
                f"gate at site {self.site!r}: the positive mean projects to {high:.4g}, the negative to {low:.4g}; "
                "is the vector's sign reversed?"
            )
        if not (spread_high and spread_low):
            return (high + low) / 2
        return (high * spread_low + low * spread_high) / (spread_high + spread_low)

    def _mean_and_spread(self, statistics: Statistics) -> tuple[float, float]:
        moments = statistics[self.site]
        direction = self._direction.exact.to(moments.mean)
        try:
            spread = float((direction @ moments.covariance @ direction).clamp(min=0).sqrt())
        except StatisticsError:
            spread = 0.0
        return float(moments.mean @ direction), spread

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"vector": self._direction.vector, "threshold": self.threshold, "per": self.per}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> ProjectionAbove:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"ProjectionAbove(site={self.site!r}, threshold={self.threshold:.4g}{shown(self.per)})"
