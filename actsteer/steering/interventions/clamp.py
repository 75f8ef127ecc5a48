"""Clamp: set how far an activation goes along the direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.steering.norms import nonzero_unit, unit
from actsteer.steering.numbers import finite


@final
@dataclass(frozen=True)
class Clamp:
    """Set the projection on the direction: h + c · (t - h·u) u, with u = v/‖v‖.

    At c = 1 every row projects to t, whatever it did before; between 0 and 1 it goes part of the way.

    Args:
        target: t, in the activation's units.

    Raises:
        ValueError: a target that is not finite.

    Source: feature clamping, Templeton et al. 2024 (scaling monosemanticity), on a direction.

    >>> import torch
    >>> Clamp(7.0)(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 0.0]), torch.tensor(1.0))
    tensor([[7., 4.]])
    """

    target: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", finite(self.target, "target"))

    def __call__(
        self, activation: Float[Tensor, "*batch d"], direction: Float[Tensor, " d"], c: Float[Tensor, ...]
    ) -> Float[Tensor, "*batch d"]:
        """h + c · (t - h·u) u."""
        along = unit(direction)
        return torch.addcmul(activation, c * (self.target - activation @ along[:, None]), along)

    def prepare(
        self, direction: Float[Tensor, " d"], c: Float[Tensor, ""]
    ) -> Callable[[Float[Tensor, "*batch d"]], Float[Tensor, "*batch d"]]:
        """h + (t - h·u) (c u), with u and c u computed here."""
        along, target = nonzero_unit(direction, by=self), self.target
        column, change = along[:, None], c * along
        return lambda activation: torch.addcmul(activation, target - activation @ column, change)
